"""sweeps/fetch_data.py, on repositories that look like the public ones."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "sweeps" / "fetch_data.py"


def commit(folder: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    found = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def jpeg(width: int, height: int, value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def run(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def at_commit(folder: Path, found: str) -> Path:
    """The script with another commit in the place of the public ones."""
    text = SCRIPT.read_text()
    for public in ("08e98c4", "d272fb1"):
        start = text.index(public)
        text = text.replace(text[start : start + 40], found)
    copy = folder / "fetch_data.py"
    copy.write_text(text)
    return copy


def numbers(folder: Path, name: str) -> str:
    """Numbers of the files that an annotation file lists."""
    listed = json.loads((folder / "annotations" / f"{name}.json").read_text())["images"]
    return "".join(re.sub(r"\D", "", record["file_name"]) for record in listed)


def test_boards_are_halved_and_every_seventh_is_validation(tmp_path: Path) -> None:
    names = [f"0{k}" for k in range(8)]
    lines = "\n".join(f"g/{n}.jpg g_not/{n}.txt" for n in names)
    files = {
        "PCBData/trainval.txt": f"{lines}\n".encode(),
        "PCBData/test.txt": b"g/00.jpg g_not/00.txt\n",
    }
    for name in names:
        files[f"PCBData/g/{name}_test.jpg"] = jpeg(640, 640, 130)
        files[f"PCBData/g_not/{name}.txt"] = b"11 20 31 50 6\n0 0 9 7 1\n"
    script = at_commit(tmp_path, commit(tmp_path / "source", files))
    done = run(script, "deep_pcb", "--source", tmp_path / "source", "--target", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert "7 train, 1 val, 1 test images" in done.stdout
    found = json.loads((tmp_path / "set/annotations/val.json").read_text())
    assert found["images"] == [{"id": 1, "file_name": "03.png", "width": 320, "height": 320}]
    boxes = [(item["category_id"], item["bbox"], item["area"]) for item in found["annotations"]]
    assert boxes == [(6, [5.5, 10.0, 10.0, 15.0], 150.0), (1, [0.0, 0.0, 4.5, 3.5], 15.75)]
    assert numbers(tmp_path / "set", "teachers") == "00020507"
    assert numbers(tmp_path / "set", "students") == "010406"
    with Image.open(tmp_path / "set/val/03.png") as image:
        assert (image.size, image.mode, image.getextrema()) == ((320, 320), "L", (136, 136))


def test_cells_without_a_size_are_left_out_and_a_fifth_is_for_choices(tmp_path: Path) -> None:
    def xml(*boxes: tuple[str, int, int, int, int]) -> bytes:
        keys = ("xmin", "ymin", "xmax", "ymax")
        items = "".join(
            f"<object><name>{name}</name><bndbox>"
            + "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, corners, strict=True))
            + "</bndbox></object>"
            for name, *corners in boxes
        )
        return f"<annotation>{items}</annotation>".encode()

    names = [f"B{k}" for k in range(6)]
    files = {
        "BCCD/ImageSets/Main/trainval.txt": "\n".join(reversed(names)).encode(),
        "BCCD/ImageSets/Main/test.txt": b"B5\n",
    }
    for name in names:
        files[f"BCCD/JPEGImages/{name}.jpg"] = jpeg(640, 480, 99)
        files[f"BCCD/Annotations/{name}.xml"] = xml(("WBC", 5, 6, 15, 26), ("RBC", 7, 7, 7, 9))
    script = at_commit(tmp_path, commit(tmp_path / "source", files))
    done = run(script, "bccd", "--source", tmp_path / "source", "--target", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    parts = ("choose", "fit", "teachers", "students")
    assert [numbers(tmp_path / "set", part) for part in parts] == ["05", "1234", "12", "34"]
    found = json.loads((tmp_path / "set/annotations/val.json").read_text())
    assert [(a["category_id"], a["bbox"]) for a in found["annotations"]] == [(2, [5, 6, 10, 20])]
    assert (tmp_path / "set/val/B5.jpg").read_bytes() == files["BCCD/JPEGImages/B5.jpg"]


@pytest.mark.parametrize(("existing", "text"), [(True, "exists: remove it"), (False, "--source")])
def test_what_cannot_be_fetched_is_one_error(tmp_path: Path, existing: bool, text: str) -> None:
    target = tmp_path / "set"
    if existing:
        target.mkdir()
    done = run(SCRIPT, "bccd", "--source", tmp_path / "none", "--target", target)
    assert done.returncode != 0
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert target.exists() == existing
