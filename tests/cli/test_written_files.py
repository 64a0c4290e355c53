"""Files that commands write: where they may be, what they are called, and that none is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from d3etr.cli.main import main
from d3etr.config.data import UnlabelledConfig
from d3etr.config.overrides import apply_overrides
from d3etr.config.tree import Config
from d3etr.demo import runs as demo
from d3etr.pseudo_labels import override_with

CLOSED = Path("/sys/found.json")
"""A place where not even root may make a file."""


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_picture_whose_name_looks_numbered_is_not_written_over(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("x/a.png", "y/a.png", "z/0001-a.png")
    pictures = [str(picture(tmp_path / name)) for name in names]
    output = tmp_path / "out"
    assert main(["predict", str(tiny_weights), *pictures, "--output", str(output), "--json"]) == 0
    drawn = [entry["picture"] for entry in json.loads(capsys.readouterr().out)]
    assert sorted(map(str, output.iterdir())) == sorted(drawn) and len({*drawn}) == 3


@pytest.mark.skipif(not CLOSED.parent.is_dir(), reason="no folder of the system to refuse files")
@pytest.mark.parametrize(
    "command",
    [
        ["pseudo-label", "{weights}", "{images}", str(CLOSED)],
        ["evaluate", "{weights}", "--annotations", "{images}", "--write-detections", str(CLOSED)],
        ["sweep", "ablation", "--table", str(CLOSED.parent)],
    ],
    ids=lambda command: command[0],
)
def test_a_place_that_takes_no_file_is_refused_before_the_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"weights": tmp_path / "nowhere.safetensors", "images": tmp_path}
    assert main([argument.format(**places) for argument in command]) == 2
    said = capsys.readouterr().err
    assert f"cannot write {CLOSED.parent}/" in said and "choose another place" in said
    assert "run.output" not in said


def test_the_folder_of_a_file_is_made(tiny_weights: Path, tmp_path: Path) -> None:
    image = picture(tmp_path / "images" / "a.png")
    output = tmp_path / "new" / "labels.json"
    assert main(["pseudo-label", str(tiny_weights), str(image.parent), str(output)]) == 0
    assert json.loads(output.read_text())["images"][0]["file_name"] == "a.png"


def test_a_folder_that_is_called_like_a_number_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = [f"{split}_images=1" for split in ("train", "validation", "test")]
    sets = [part for text in sizes for part in ("--set", text)]
    assert main(["render-digit-scenes", "--root", "2024", *sets]) == 0
    assert len([*Path("2024").glob("v1-*/annotations/*.json")]) == 3


def test_what_trains_on_pseudo_labels_names_folders_of_any_script() -> None:
    override = override_with(Path("out/😀.json"), UnlabelledConfig(images=Path("photos 😀")))
    tree, problems = apply_overrides({}, [override])
    assert not problems
    assert tree["data"]["unlabelled"] == {"images": "photos 😀", "labels": "out/😀.json"}


def test_the_demonstration_finds_its_teacher_in_a_folder_of_any_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Config] = []

    def launch(config: Config, **options: object) -> SimpleNamespace:
        asked.append(config)
        return SimpleNamespace(metrics={})

    monkeypatch.setattr(demo, "launch", launch)
    output = tmp_path / "a: b"
    demo.run_demo(train_teacher=True, launcher="local", overrides=[f"run.output='{output}'"])
    teacher = asked[-1].teacher
    assert teacher is not None and isinstance(teacher.weights, Path)
    assert teacher.weights.parent.parent == output


BROKEN = """
import os, sys
from dataclasses import replace
from d3etr.cli import explain, main

def run(options):
    reader, writer = os.pipe()
    os.close(reader)
    os.write(writer if sys.argv[1] == "another" else 1, b"text")

main.COMMANDS = (replace(explain.COMMAND, run=run),)
sys.exit(main.whole(["explain"]))
"""


@pytest.mark.parametrize(("pipe", "code"), [("its own", 0), ("another", 1)])
def test_only_a_reader_that_has_seen_enough_is_no_failure(pipe: str, code: int) -> None:
    reader, writer = os.pipe()
    if pipe == "its own":
        os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, pipe], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == code, done.stderr
    assert ("BrokenPipeError" in done.stderr) == bool(code)


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "{weights}", "{folder}", "--output", "{folder}/out"],
        ["export", "{loop}", "{folder}/out.safetensors"],
        ["sweep", "{loop}", "--dry-run"],
        ["train", "{loop}", "--dry-run"],
    ],
    ids=["picture", "source", "sweep", "recipe"],
)
def test_links_in_a_circle_are_a_mistake_of_the_user(
    command: list[str], tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for one, other in (("a.png", "b.png"), ("b.png", "a.png"), ("l.safetensors",) * 2):
        (tmp_path / one).symlink_to(other)
    places = {"weights": tiny_weights, "folder": tmp_path, "loop": tmp_path / "l.safetensors"}
    assert main([argument.format(**places) for argument in command]) == 2
    said = capsys.readouterr().err
    assert "error: " in said and ("a.png" in said or "l.safetensors" in said)
