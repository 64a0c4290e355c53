"""What tests and benchmarks of the COCO recipes stand on: a small COCO, and who teaches."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

from data.coco_files import annotation, picture

from d3etr.config.detector import DetectorConfig
from d3etr.config.tree import Config
from d3etr.detectors.imports.categories import COCO
from d3etr.detectors.weights import FORMAT, FORMAT_KEY, INFO_KEY, WeightsInfo, write_tensors

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "trainers" / "recipes" / "coco"
TRAIN_IMAGES = 118_287
"""Of train2017; 1,021 of them have no object."""
SIZES = ((64, 48), (48, 64), (64, 43), (50, 50))
"""Widths and heights, pixels: COCO's usual ones, a tenth of them."""


def recipes() -> list[str]:
    """Recipes that can be run, relative to their folder."""
    return sorted(p.relative_to(RECIPES).as_posix() for p in RECIPES.glob("*/*.yaml"))


LARGE: dict[str, dict[str, Any]] = {
    "coco-rtdetr-r101": {
        "backbone": {"name": "resnet101vd"},
        "decoder_layers": 6,
        "encoder_width": 384,
        "encoder_feedforward": 2048,
        "expansion": 1.0,
    },
    "coco-dfine-x": {
        "backbone": {"name": "timm/hgnetv2_b5"},
        "levels": 3,
        "points": [3, 6, 3],
        "width": 256,
        "feedforward": 1024,
        "decoder_layers": 6,
        "encoder_width": 384,
        "encoder_feedforward": 2048,
        "encoder_blocks": 3,
        "expansion": 1.0,
        "curvature": 8.0,
    },
}
"""Official teachers that differ from students in more than the backbone, by their files' names."""


def teacher_detector(config: Config) -> DetectorConfig:
    """The teacher that a recipe names: of ``LARGE``, or with the backbone in the file's name."""
    assert config.teacher is not None
    large = LARGE.get(Path(str(config.teacher.weights)).stem)
    if large is not None:
        return DetectorConfig.parse(config.student.detector.model_dump(mode="json") | large)
    found = re.search(r"-r(\d+)\.", str(config.teacher.weights))
    assert found is not None, "a teacher's file ends with its backbone"
    student = config.student.detector
    backbone = student.backbone.model_copy(update={"name": f"resnet{found[1]}"})
    return student.model_copy(update={"backbone": backbone})


def write_teacher_header(config: Config, folder: Path) -> None:
    """A weights file that says what the teacher is and holds no tensors: for dry runs."""
    assert config.teacher is not None
    info = WeightsInfo(
        detector=teacher_detector(config),
        categories=COCO,
        preprocessing=config.data.preprocessing,
    )
    metadata = {FORMAT_KEY: FORMAT, INFO_KEY: info.model_dump_json()}
    write_tensors(folder / str(config.teacher.weights), {}, metadata)


def write_coco(folder: Path, train: int, validation: int, *, pixels: bool = True) -> None:
    """COCO's folders under its names, with all 80 categories, crowds and images of nothing.

    Args:
        folder: where ``train2017``, ``val2017`` and ``annotations`` appear.
        train: training images.
        validation: validation images.
        pixels: False leaves the image files empty, which is enough to count them.
    """
    for name, count in (("train2017", train), ("val2017", validation)):
        (folder / name).mkdir(parents=True)
        content = _content(count, Random(name))
        for image in content["images"]:
            path = folder / name / image["file_name"]
            if pixels:
                picture(image["width"], image["height"], image["id"]).save(path, quality=90)
            else:
                path.touch()
        (folder / "annotations").mkdir(exist_ok=True)
        file = folder / "annotations" / f"instances_{name}.json"
        file.write_text(json.dumps(content))


def _content(count: int, random: Random) -> dict[str, Any]:
    """Every fifth image has a crowd, every seventh nothing; categories take turns."""
    images, annotations = [], []
    for index in range(count):
        number, (width, height) = 9 + 37 * index, SIZES[index % len(SIZES)]
        name = f"{number:012}.jpg"
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for part in range(0 if index % 7 == 3 else 1 + index % 4):
            box = _box(width, height, random)
            known = len(annotations)
            category = COCO[known % len(COCO)][0]
            crowd = int(index % 5 == 0 and part == 1)
            area = 0.6 * box[2] * box[3]
            annotations.append(
                annotation(900_000 + known, number, category, box, area=area, iscrowd=crowd)
            )
    categories = [{"id": number, "name": name} for number, name in COCO]
    return {"images": images, "annotations": annotations, "categories": categories}


def _box(width: int, height: int, random: Random) -> tuple[float, float, float, float]:
    """x, y, width and height in pixels, within the image."""
    across, down = random.uniform(8, width - 2), random.uniform(8, height - 2)
    left, top = random.uniform(0, width - across), random.uniform(0, height - down)
    return round(left, 2), round(top, 2), round(across, 2), round(down, 2)
