"""Links in image folders: what leads out of the folder is another place's file."""

import json
from pathlib import Path

import pytest
from PIL import Image

from d3etr.cli.main import main

KINDS = {
    "a file elsewhere": ("a.png", "../elsewhere/a.png"),
    "a folder elsewhere": ("sub", "../elsewhere"),
    "a system's file": ("a.png", "/etc/hostname"),
    "a neighbour whose name begins alike": ("a.png", "../images-more/a.png"),
}


def data_set(folder: Path, name: str) -> list[str]:
    """A split of one picture called ``name``, as overrides; the picture is not made."""
    for other in ("images", "elsewhere", "images-more"):
        (folder / other).mkdir()
        Image.new("RGB", (20, 20)).save(folder / other / "real.png")
        if other != "images":
            Image.new("RGB", (20, 20)).save(folder / other / "a.png")
    content = {
        "images": [{"id": 1, "file_name": name, "width": 20, "height": 20}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
        "categories": [{"id": 1, "name": "x"}],
    }
    (folder / "a.json").write_text(json.dumps(content))
    split = {"images": str(folder / "images"), "annotations": str(folder / "a.json")}
    overrides = [f"data={json.dumps({'train': split, 'validation': split})}"]
    overrides += ["optimisation={steps: 1, batch_size: 1}", "student.detector.backbone.name=small"]
    return [part for override in overrides for part in ("--set", override)]


ALLOWED = ["--set", "data.train.follow_links=true", "--set", "data.validation.follow_links=true"]


@pytest.mark.parametrize("kind", KINDS)
def test_links_out_of_the_image_folder_are_refused_unless_allowed(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link, target = KINDS[kind]
    name = link if link.endswith(".png") else f"{link}/a.png"
    overrides = data_set(tmp_path, name)
    (tmp_path / "images" / link).symlink_to(target)
    assert main(["train", *overrides, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "links lead out of this folder for 1 images" in said
    assert repr(name) in said and "follow_links" in said
    assert main(["check-data", *overrides]) == 1
    assert "links lead out of this folder" in "".join(capsys.readouterr())
    if target.startswith(".."):
        assert main(["train", *overrides, *ALLOWED, "--dry-run"]) == 0


def test_links_within_the_folder_and_to_the_folder_are_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = data_set(tmp_path, "sub/a.png")
    (tmp_path / "images" / "sub").mkdir()
    (tmp_path / "images" / "sub" / "a.png").symlink_to("../real.png")
    (tmp_path / "link").symlink_to("images")
    through = [part.replace(f"{tmp_path}/images", f"{tmp_path}/link") for part in overrides]
    for given in (overrides, through):
        assert main(["train", *given, "--dry-run"]) == 0
        assert main(["check-data", *given, "--json"]) == 0


def test_check_data_reports_splits_of_which_none_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = data_set(tmp_path, "missing.png")
    (tmp_path / "a.json").write_text("{")
    assert main(["check-data", *overrides]) == 1
    assert capsys.readouterr().out.count("broken JSON") == 2


LONG = "a" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--resume", LONG],
        ["sweep", "--resume", LONG],
        ["compare", LONG],
        ["import-weights", LONG, "x.safetensors"],
        ["check-data", "--train", LONG, LONG, "--validation", LONG, LONG],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_name_that_no_file_can_have_is_one_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "File name too long" in said
