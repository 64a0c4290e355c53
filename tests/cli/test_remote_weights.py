"""Commands that take weights and data from URLs."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from test_commands import coco_set, picture

import d3etr
from d3etr.cli.main import main

SMALL = (
    "student.detector={width: 16, heads: 2, feedforward: 16, encoder_layers: 1, "
    "decoder_layers: 2, queries: 5, backbone: {name: small, stem_width: 8, stage_widths: [8, 8]}}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("D3ETR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, tiny_weights: Path) -> Iterator[tuple[Path, Path]]:
    """Weights and a data set on ``memory://shared``; the data set's folder and file."""
    files = fsspec.filesystem("memory")
    images, annotations = coco_set(tmp_path)
    files.pipe("/shared/weights.safetensors", tiny_weights.read_bytes())
    files.pipe("/shared/set.json", annotations.read_bytes())
    for image in images.iterdir():
        files.pipe(f"/shared/set/{image.name}", image.read_bytes())
    yield images, annotations
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def evaluated(weights: str, images: str, annotations: str) -> list[str]:
    places = ["--images", images, "--annotations", annotations, "--workers", "0"]
    return ["evaluate", weights, *places, "--json"]


def test_evaluate_gives_the_same_from_urls(
    tiny_weights: Path, shared: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    urls = (
        "memory://shared/weights.safetensors",
        "memory://shared/set",
        "memory://shared/set.json",
    )
    results = []
    for places in ((str(tiny_weights), *map(str, shared)), urls):
        assert main(evaluated(*places)) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["data_digest"] == results[1]["data_digest"]
    assert results[1]["weights"] == urls[0]


def test_predict_and_export_take_weights_from_a_url(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(picture(tmp_path / "a.png"))
    found = []
    for weights in (str(tiny_weights), "memory://shared/weights.safetensors"):
        assert main(["predict", weights, image, "--threshold", "0", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    target = tmp_path / "copy.safetensors"
    assert main(["export", "memory://shared/weights.safetensors", str(target)]) == 0
    assert d3etr.load(target).info == d3etr.load("memory://shared/weights.safetensors").info


def test_broken_weights_are_named_by_their_url(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec.filesystem("memory").pipe("/shared/broken.safetensors", b"nothing")
    image = str(picture(tmp_path / "a.png"))
    assert main(["predict", "memory://shared/broken.safetensors", image]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: memory://shared/broken.safetensors: not a whole safetensors")
    assert main(["predict", "memory://shared/none", image]) == 2
    assert "memory://shared/none does not exist" in capsys.readouterr().err


def recipe(images: str = "set", weights: str = "weights.safetensors") -> list[str]:
    root = "memory://shared"
    split = f"{{images: {root}/{images}, annotations: {root}/set.json}}"
    overrides = [
        f"data={{train: {split}, validation: {split}, preprocessing: {{shortest_side: null, "
        "normalisation: per_image}}",
        "optimisation={steps: 5, batch_size: 2}",
        "distillation.method=d3etr",
        f"teacher.weights={root}/{weights}",
        SMALL,
    ]
    return [part for override in overrides for part in ("--set", override)]


def test_a_dry_run_fetches_no_image(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *recipe(), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 training images, 3 classes" in said
    assert f"annotations and weights are in the cache {cache}" in said
    assert sum(path.is_file() and path.name != "lock" for path in cache.rglob("*")) == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [["--dry-run"], ["--launcher", "local"], []])
def test_a_run_asks_for_its_urls_before_anything_starts(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *recipe("sett", "weihgts"), *arguments]) == 2
    said = capsys.readouterr().err
    assert "data.train.images: memory://shared/sett is no folder with files in it" in said
    assert "teacher.weights: memory://shared/weihgts does not exist" in said
    assert not (tmp_path / "runs").exists()
