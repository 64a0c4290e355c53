"""Weights by name: a package of random weights in a folder that pip looks into, and the command."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from port_names import as_the_port

from d3etr.cli.main import main
from d3etr.config.backbone import BackboneConfig
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.imports import packages
from d3etr.detectors.weights import load_backbone_weights
from d3etr.files import sha256

NAME = "efficientnet-lite1"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel as the index has it, of random weights; pip finds it, and no index."""
    package = packages.PACKAGES[NAME]
    torch.manual_seed(0)
    network = timm.create_model(package.backbone.removeprefix("timm/"), pretrained=False)
    torch.save(as_the_port(network), tmp_path / "weights.pth")
    stem = package.project.replace("-", "_")
    info = f"{stem}-{package.version}.dist-info"
    path = tmp_path / "index" / f"{stem}-{package.version}-py2.py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "weights.pth", package.member)
        about = f"Name: {package.project}\nVersion: {package.version}\n"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\n{about}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setitem(packages.PACKAGES, NAME, replace(package, digest=sha256(path)))
    monkeypatch.chdir(tmp_path)
    return path


def test_a_package_becomes_a_backbones_file(
    wheel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "get", NAME, "--output", "out.safetensors", "--json"]) == 0
    printed = capsys.readouterr()
    assert "Apache-2.0" in printed.err and "github.com" in printed.err
    answer = json.loads(printed.out)
    name = answer["use"]["student.detector.backbone.name"]
    backbone = build_backbone(BackboneConfig(name=name))
    load_backbone_weights(backbone, Path("out.safetensors"))
    stem = torch.load("weights.pth", weights_only=True)["_bn0.weight"]
    assert torch.equal(backbone.state_dict()["network.bn1.weight"], stem)


def test_another_file_than_the_checked_one_is_refused(
    wheel: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = packages.PACKAGES[NAME]
    monkeypatch.setitem(packages.PACKAGES, NAME, replace(package, digest="0" * 64))
    assert main(["weights", "get", NAME]) == 2
    assert "another file than the one that was checked" in capsys.readouterr().err
    wheel.unlink()
    assert main(["weights", "get", NAME]) == 2
    text = capsys.readouterr().err
    assert "could not download" in text and "PIP_FIND_LINKS" in text
    assert not list(Path().glob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["get"], "found no name, expected one of efficientnet-lite0"),
        (["get", "resnet50"], "found 'resnet50', expected one of efficientnet-lite0"),
        (["list", NAME], "has no effect"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and text in line
