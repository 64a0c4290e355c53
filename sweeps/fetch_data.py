"""Fetches the public data sets of this folder's tables, as COCO files.

    python sweeps/fetch_data.py deep_pcb    # into data/deep_pcb, from GitHub (git is needed)
    python sweeps/fetch_data.py bccd
    python sweeps/fetch_data.py bccd --source A/CLONE --target SOMEWHERE

Commits are fixed. deep_pcb (MIT): 1,500 boards of 320 x 320; choose on val, report on test. bccd
(MIT): 364 micrographs in two splits; choose on annotations/choose, a fifth of what is trained on
(train on annotations/fit then), and report on val. annotations/teachers and annotations/students
share out the training pictures of either, for a teacher that has not seen its students'.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Record = dict[str, Any]


@dataclass(frozen=True)
class Clone:
    """A repository at one commit; files are read from it as they were committed."""

    folder: Path
    commit: str

    def read(self, path: str) -> bytes:
        """One file."""
        command = ["git", "-C", str(self.folder), "show", f"{self.commit}:{path}"]
        return subprocess.run(command, check=True, capture_output=True).stdout

    def lines(self, path: str) -> list[str]:
        """The lines of a text file."""
        return self.read(path).decode().split("\n")


@dataclass(frozen=True)
class Labelled:
    """One image of a split: the file to write, and its objects."""

    record: Record
    content: bytes
    objects: Sequence[Record]


@dataclass(frozen=True)
class DataSet:
    """Where a set comes from and how its splits are read.

    Attributes:
        repository: address of the source.
        commit: of the source.
        categories: names, with ids from 1 on.
        splits: name of each split -> reads it from a clone.
        parts: of the training split: annotation file -> whether the image of a place is in it.
    """

    repository: str
    commit: str
    categories: tuple[str, ...]
    splits: Mapping[str, Callable[[Clone], list[Labelled]]]
    parts: Mapping[str, Callable[[int], bool]]


def _box(category: int, left: float, top: float, right: float, bottom: float) -> Record:
    width, height = right - left, bottom - top
    return {
        "category_id": category,
        "iscrowd": 0,
        "bbox": [left, top, width, height],
        "area": width * height,
    }


def _deep_pcb(listed: str, kept: Callable[[int], bool]) -> Callable[[Clone], list[Labelled]]:
    """The tested image of each pair, halved; 16 grey levels, as the source is black and white."""

    def read(clone: Clone) -> list[Labelled]:
        lines = [line.split() for line in clone.lines(f"PCBData/{listed}.txt") if line.strip()]
        return [_board(clone, *pair) for index, pair in enumerate(lines) if kept(index)]

    return read


def _board(clone: Clone, image: str, annotations: str) -> Labelled:
    source = Image.open(io.BytesIO(clone.read(f"PCBData/{image.removesuffix('.jpg')}_test.jpg")))
    half = source.convert("L").resize((320, 320), Image.Resampling.LANCZOS)
    grey = np.round(np.asarray(half) / 17).astype(np.uint8) * np.uint8(17)
    stored = io.BytesIO()
    Image.fromarray(grey).save(stored, "PNG", optimize=True)
    objects = []
    for line in clone.lines(f"PCBData/{annotations}"):
        if line.strip():
            *corners, category = (int(number) for number in line.replace(",", " ").split())
            objects.append(_box(category, *(corner / 2 for corner in corners)))
    name = f"{Path(image).stem}.png"
    return Labelled({"file_name": name, "width": 320, "height": 320}, stored.getvalue(), objects)


def _bccd(listed: str) -> Callable[[Clone], list[Labelled]]:
    """The source's own JPEG files; boxes without a size are left out."""

    def read(clone: Clone) -> list[Labelled]:
        names = [name.strip() for name in clone.lines(f"BCCD/ImageSets/Main/{listed}.txt")]
        return [_smear(clone, name) for name in sorted(names) if name]

    return read


def _smear(clone: Clone, name: str) -> Labelled:
    root = ElementTree.fromstring(clone.read(f"BCCD/Annotations/{name}.xml"))
    objects = []
    for item in root.iter("object"):
        box = item.find("bndbox")
        assert box is not None
        corners = [float(box.findtext(key) or 0) for key in ("xmin", "ymin", "xmax", "ymax")]
        found = _box(1 + CELLS.index(item.findtext("name") or ""), *corners)
        if min(found["bbox"][2:]) > 0:
            objects.append(found)
    record = {"file_name": f"{name}.jpg", "width": 640, "height": 480}
    return Labelled(record, clone.read(f"BCCD/JPEGImages/{name}.jpg"), objects)


DEFECTS = ("open", "short", "mousebite", "spur", "copper", "pin-hole")
CELLS = ("RBC", "WBC", "Platelets")
SETS = {
    "deep_pcb": DataSet(
        "https://github.com/tangsanli5201/DeepPCB",
        "08e98c4db5922613fb97176eb3d6497d48260cb1",
        DEFECTS,
        {
            "train": _deep_pcb("trainval", lambda index: index % 7 != 3),
            "val": _deep_pcb("trainval", lambda index: index % 7 == 3),
            "test": _deep_pcb("test", lambda index: True),
        },
        {"teachers": lambda place: place % 2 == 0, "students": lambda place: place % 2 == 1},
    ),
    "bccd": DataSet(
        "https://github.com/Shenggan/BCCD_Dataset",
        "d272fb14cdff6e473fafeeeba32aba5f560e9e43",
        CELLS,
        {"train": _bccd("trainval"), "val": _bccd("test")},
        {  # two splits only: choices are made on a fifth of what is trained on
            "choose": lambda place: place % 5 == 0,
            "fit": lambda place: place % 5 > 0,
            "teachers": lambda place: place % 5 in (1, 2),
            "students": lambda place: place % 5 in (3, 4),
        },
    ),
}


def annotations_of(images: Sequence[Labelled], categories: Sequence[str]) -> Record:
    """COCO detection JSON of a split; ids count from 1."""
    records = [{"id": number, **image.record} for number, image in enumerate(images, 1)]
    objects = [
        {"image_id": number, **item}
        for number, image in enumerate(images, 1)
        for item in image.objects
    ]
    return {
        "images": records,
        "annotations": [{"id": number, **item} for number, item in enumerate(objects, 1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(categories, 1)],
    }


def write(splits: Mapping[str, Sequence[Labelled]], found: DataSet, folder: Path) -> None:
    """Images and annotations of every split."""
    (folder / "annotations").mkdir(parents=True)
    for name, images in splits.items():
        (folder / name).mkdir()
        for image in images:
            (folder / name / image.record["file_name"]).write_bytes(image.content)
        _write_json(folder, name, images, found)
    for name, holds in found.parts.items():
        part = [image for place, image in enumerate(splits["train"]) if holds(place)]
        _write_json(folder, name, part, found)


def _write_json(folder: Path, name: str, images: Sequence[Labelled], found: DataSet) -> None:
    text = json.dumps(annotations_of(images, found.categories))
    (folder / "annotations" / f"{name}.json").write_text(text)


def fetch(found: DataSet, source: str, target: Path) -> None:
    """Clone, convert and write one set, whole or not at all.

    Raises:
        SystemExit: git fails.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "source"
        command = ["git", "clone", "--quiet", "--no-checkout", source, str(folder)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"error: could not clone {source}: give another with --source")
        clone = Clone(folder, found.commit)
        try:
            splits = {name: read(clone) for name, read in found.splits.items()}
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"error: {source}: {error.stderr.decode().strip()}") from error
        write(splits, found, Path(scratch) / "written")
        (Path(scratch) / "written").rename(target)
    counts = ", ".join(f"{len(images)} {name}" for name, images in splits.items())
    print(f"{target}: {counts} images")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=SETS)
    parser.add_argument("--source", help="a clone or mirror of the repository")
    parser.add_argument("--target", type=Path, help="folder to write (data/NAME)")
    options = parser.parse_args()
    found, target = SETS[options.name], options.target or Path("data") / options.name
    if target.exists():
        raise SystemExit(f"error: {target} exists: remove it, or give another --target")
    target.parent.mkdir(parents=True, exist_ok=True)
    fetch(found, options.source or found.repository, target)


if __name__ == "__main__":
    main()
