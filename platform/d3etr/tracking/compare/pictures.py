"""What several runs detect on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from d3etr.config.data import DataConfig
from d3etr.data.digit_scenes.folder import scenes_folder, split_paths
from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit, read_split
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.inference import Predictor, load
from d3etr.tracking.compare.comparison import Comparison
from d3etr.tracking.figures.images import Objects, Scene
from d3etr.tracking.figures.look import choose_images, pixels_of, truth_of
from d3etr.tracking.figures.style import Array

THRESHOLD = 0.3
SAME_OBJECT_IOU = 0.5


@dataclass(frozen=True)
class Pictures:
    """The images of a comparison.

    Attributes:
        split: they are of.
        pictures: evenly spaced; none where the data is not here.
        missing: what cannot be shown and why, a sentence each.
    """

    split: str
    pictures: tuple[Scene, ...]
    missing: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything but the pixels."""
        shown = [
            {
                "image": picture.title,
                "truth": _as_json(picture.truth),
                "detections": {
                    name: None if found is None else _as_json(found)
                    for name, found in picture.detections.items()
                },
            }
            for picture in self.pictures
        ]
        return {"split": self.split, "threshold": THRESHOLD, "images": shown} | {
            "missing": list(self.missing)
        }


def _as_json(objects: Objects) -> list[dict[str, Any]]:
    """One plain mapping an object."""
    found: list[dict[str, Any]] = []
    for index, (name, box) in enumerate(zip(objects.names, objects.boxes_xyxy, strict=True)):
        found.append({"name": name, "box_xyxy": [round(float(side), 1) for side in box]})
        if objects.scores is not None and objects.right is not None:
            found[-1] |= {
                "score": round(objects.scores[index], 4),
                "right": objects.right[index],
            }
    return found


def look_at_pictures(comparison: Comparison, count: int) -> Pictures:
    """Detect with each group's first run on a few images of the split that is compared.

    What is not here (data, images, weights) is named and left out; nothing is written.

    Args:
        comparison: of the runs.
        count: how many images.
    """
    split, missing = _find_split(comparison)
    if split is None:
        return Pictures(comparison.split, (), tuple(missing))
    predictors: dict[str, Predictor | None] = {}
    for group in comparison.groups:
        try:
            predictors[group.label] = load(RunFolder(group.runs[0].folder).weights)
        except UserError as error:
            predictors[group.label] = None
            missing.append(f"No detections of {group.label}: {error}")
    pictures = []
    for record in choose_images(split, count):
        try:
            pictures.append(_picture(split, record, predictors))
        except UserError as error:
            missing.append(f"One image is left out: {error}")
    return Pictures(comparison.split, tuple(pictures), tuple(missing))


def _find_split(comparison: Comparison) -> tuple[DetectionSplit | None, list[str]]:
    """Of the first run whose data is here; else why there is none."""
    name: Literal["validation", "test"] = "test" if comparison.split == "test" else "validation"
    problems: dict[str, None] = {}
    for group in comparison.groups:
        try:
            return _open(group.runs[0].config.data, name), []
        except UserError as error:
            problems[f"No images: {error}"] = None
    return None, list(problems)


def _open(data: DataConfig, name: Literal["validation", "test"]) -> DetectionSplit:
    """Like ``open_split``, but digit scenes that are not here are not written."""
    if data.digit_scenes is None:
        place = data.test if name == "test" else data.validation
    else:
        folder = scenes_folder(data.digit_scenes)
        place = split_paths(folder)[name]
        if not Path(str(place.annotations)).is_file():
            raise UserError(
                f"the digit scenes are not in {folder}; d3etr render-digit-scenes makes them"
            )
    if place is None:
        raise UserError(f"the run's configuration has no {name} split")
    return read_split(name, place)


def _picture(
    split: DetectionSplit, record: ImageRecord, predictors: Mapping[str, Predictor | None]
) -> Scene:
    truth = truth_of(record, [category.name for category in split.categories])
    pixels = pixels_of(split, record)
    found = {
        label: None if predictor is None else _detect(predictor, pixels, truth)
        for label, predictor in predictors.items()
    }
    return Scene(pixels, truth, found, record.file_name)


def _detect(predictor: Predictor, pixels: NDArray[np.uint8], truth: Objects) -> Objects:
    [found] = predictor.predict(pixels, THRESHOLD)
    boxes = np.asarray(found.boxes_xyxy, dtype=float)
    return Objects(boxes, found.names, found.scores.tolist(), _right(boxes, found.names, truth))


def _right(
    boxes: Array | Sequence[Sequence[float]], names: Sequence[str], truth: Objects
) -> tuple[bool, ...]:
    """Which detections, most certain first, find an object that none before has found."""
    if not names or not truth.names:
        return (False,) * len(names)
    overlaps = box_iou(
        *(torch.as_tensor(np.asarray(each)) for each in (boxes, truth.boxes_xyxy))
    ).numpy()
    free = np.ones(len(truth.names), dtype=bool)
    verdicts = []
    for row, name in zip(overlaps, names, strict=True):
        same = np.array([other == name for other in truth.names])
        overlap = np.where(same & free, row, 0.0)
        best = int(overlap.argmax())
        verdicts.append(bool(overlap[best] >= SAME_OBJECT_IOU))
        free[best] &= not verdicts[-1]
    return tuple(verdicts)
