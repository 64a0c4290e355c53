"""The scenes of a COCO file, written in the other formats: the same images, boxes and classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from d3etr.config.data import SplitConfig

SUBSETS = {"train": "train", "validation": "val", "test": "test"}
Splits = Mapping[str, SplitConfig]


def _content(split: SplitConfig) -> tuple[Path, dict[str, Any]]:
    assert isinstance(split.images, Path) and isinstance(split.annotations, Path)
    return split.images, json.loads(split.annotations.read_text())


def _boxes(content: dict[str, Any], image: int) -> list[dict[str, Any]]:
    return [entry for entry in content["annotations"] if entry["image_id"] == image]


def _names(content: dict[str, Any]) -> dict[int, str]:
    return {entry["id"]: entry["name"] for entry in content["categories"]}


def write_yolo(splits: Splits, folder: Path) -> dict[str, SplitConfig]:
    """images/ and labels/ with a data.yaml, as Ultralytics has them."""
    names: dict[int, str] = {}
    for name, split in splits.items():
        images, content = _content(split)
        names, subset = _names(content), SUBSETS[name]
        labels = list(names)
        shutil.copytree(images, folder / "images" / subset)
        (folder / "labels" / subset).mkdir(parents=True)
        for image in content["images"]:
            width, height = image["width"], image["height"]
            lines = []
            for entry in _boxes(content, image["id"]):
                x, y, w, h = entry["bbox"]
                box = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                numbers = " ".join(map(repr, box))
                lines.append(f"{labels.index(entry['category_id'])} {numbers}\n")
            label = folder / "labels" / subset / f"{Path(image['file_name']).stem}.txt"
            label.write_text("".join(lines))
    tree = {SUBSETS[name]: f"images/{SUBSETS[name]}" for name in splits}
    tree |= {"path": ".", "names": dict(enumerate(names.values()))}
    (folder / "data.yaml").write_text(yaml.safe_dump(tree))
    return {name: SplitConfig(annotations=folder / "data.yaml") for name in splits}


def write_voc(splits: Splits, folder: Path) -> dict[str, SplitConfig]:
    """Annotations, JPEGImages, ImageSets/Main; names of files begin with their split's."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for name, split in splits.items():
        images, content = _content(split)
        names, stems = _names(content), []
        for image in content["images"]:
            stem = f"{SUBSETS[name]}_{Path(image['file_name']).stem}"
            file_name = f"{stem}{Path(image['file_name']).suffix}"
            shutil.copy(images / image["file_name"], folder / "JPEGImages" / file_name)
            objects = "".join(
                f"<object><name>{names[entry['category_id']]}</name>"
                f"<difficult>{entry.get('iscrowd', 0)}</difficult><bndbox>"
                f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
                "</bndbox></object>\n"
                for entry in _boxes(content, image["id"])
                for x, y, w, h in [entry["bbox"]]
            )
            size = f"<width>{image['width']}</width><height>{image['height']}</height>"
            (folder / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation><filename>{file_name}</filename><size>{size}<depth>3</depth></size>\n"
                f"{objects}</annotation>\n"
            )
            stems.append(stem)
        lines = "".join(f"{stem}\n" for stem in stems)
        (folder / "ImageSets" / "Main" / f"{SUBSETS[name]}.txt").write_text(lines)
    return {name: SplitConfig(annotations=folder) for name in splits}


def write_imagefolder(splits: Splits, folder: Path) -> dict[str, SplitConfig]:
    """A folder per split with images and metadata.jsonl."""
    for name, split in splits.items():
        images, content = _content(split)
        names = _names(content)
        shutil.copytree(images, folder / name)
        lines = []
        for image in content["images"]:
            entries = _boxes(content, image["id"])
            objects = {
                "bbox": [entry["bbox"] for entry in entries],
                "categories": [names[entry["category_id"]] for entry in entries],
            }
            lines.append(json.dumps({"file_name": image["file_name"], "objects": objects}) + "\n")
        (folder / name / "metadata.jsonl").write_text("".join(lines))
    return {name: SplitConfig(annotations=folder) for name in splits}


WRITERS: dict[str, Callable[[Splits, Path], dict[str, SplitConfig]]] = {
    "yolo": write_yolo,
    "voc": write_voc,
    "imagefolder": write_imagefolder,
}
