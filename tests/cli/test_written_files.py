"""Files that commands write: where they may be, what they are called, and that none is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d3etr.cli.main import main

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
