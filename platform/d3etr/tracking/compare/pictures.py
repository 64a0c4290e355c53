"""What several runs detect on the same images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.ops import box_iou

from d3etr.config.data import DataConfig
from d3etr.data.coco import DetectionSplit, ImageRecord, read_split
from d3etr.data.digit_scenes.folder import scenes_folder, split_paths
from d3etr.data.images import load_image
from d3etr.errors import UserError
from d3etr.inference import Predictor, load
from d3etr.tracking.compare.comparison import Comparison
from d3etr.tracking.selection import choose_images

THRESHOLD = 0.3
SAME_OBJECT_IOU = 0.5
SHARP_SIDE = 200
"""Smaller images are kept pixel by pixel; larger ones are stored as JPEG."""
LONGEST_SIDE = 512


@dataclass(frozen=True)
class Objects:
    """K objects in an image, annotated or detected.

    Attributes:
        boxes_xyxy: K boxes in pixels of the image.
        names: K class names.
        scores: K probabilities; None for annotated objects.
        right: K times whether an annotated object of that class is there; None for those.
    """

    boxes_xyxy: tuple[tuple[float, ...], ...]
    names: tuple[str, ...]
    scores: tuple[float, ...] | None = None
    right: tuple[bool, ...] | None = None

    def as_json(self) -> list[dict[str, Any]]:
        """One plain mapping an object."""
        objects: list[dict[str, Any]] = []
        for index, (name, box) in enumerate(zip(self.names, self.boxes_xyxy, strict=True)):
            objects.append({"name": name, "box_xyxy": [round(side, 1) for side in box]})
            if self.scores is not None and self.right is not None:
                objects[-1] |= {"score": round(self.scores[index], 4), "right": self.right[index]}
        return objects


@dataclass(frozen=True)
class Picture:
    """One image, what is on it, and what each group's first run detects.

    Attributes:
        title: its file.
        width: pixels.
        height: pixels.
        content: bytes of an image file, perhaps smaller than the image.
        media_type: of ``content``.
        truth: annotated objects.
        detections: of each group; None where its weights cannot be used.
    """

    title: str
    width: int
    height: int
    content: bytes
    media_type: Literal["image/png", "image/jpeg"]
    truth: Objects
    detections: tuple[Objects | None, ...]


@dataclass(frozen=True)
class Pictures:
    """The images of a comparison.

    Attributes:
        split: they are of.
        pictures: evenly spaced; none where the data is not here.
        missing: what cannot be shown and why, a sentence each.
    """

    split: str
    pictures: tuple[Picture, ...]
    missing: tuple[str, ...]

    def as_json(self, names: Sequence[str]) -> dict[str, Any]:
        """Everything but the pixels.

        Args:
            names: of the groups.
        """
        shown = [
            {
                "image": picture.title,
                "truth": picture.truth.as_json(),
                "detections": {
                    name: None if found is None else found.as_json()
                    for name, found in zip(names, picture.detections, strict=True)
                },
            }
            for picture in self.pictures
        ]
        return {"split": self.split, "threshold": THRESHOLD, "images": shown} | {
            "missing": list(self.missing)
        }


def look_at_pictures(comparison: Comparison, count: int) -> Pictures:
    """Detect with each group's first run on a few images of the split that is compared.

    What is not here (data, images, weights) is said and left out; nothing is written.

    Args:
        comparison: of the runs.
        count: how many images.
    """
    split, missing = _find_split(comparison)
    if split is None:
        return Pictures(comparison.split, (), tuple(missing))
    predictors: list[Predictor | None] = []
    for group in comparison.groups:
        try:
            predictors.append(load(group.runs[0].folder / "weights.safetensors"))
        except UserError as error:
            predictors.append(None)
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
    split: DetectionSplit, record: ImageRecord, predictors: Sequence[Predictor | None]
) -> Picture:
    labels, boxes = record.objects()
    classes = [category.name for category in split.categories]
    truth = Objects(_boxes(boxes), tuple(classes[label] for label in labels.tolist()))
    # Upright as the annotations have it.
    image = load_image(split.path(record), (record.width, record.height))
    pixels = np.asarray(image, dtype=np.uint8)
    content, media_type = _content(image)
    return Picture(
        record.file_name,
        record.width,
        record.height,
        content,
        media_type,
        truth,
        tuple(None if each is None else _detect(each, pixels, truth) for each in predictors),
    )


def _detect(predictor: Predictor, pixels: NDArray[np.uint8], truth: Objects) -> Objects:
    [found] = predictor.predict(pixels, THRESHOLD)
    boxes, names = _boxes(found.boxes_xyxy), found.names
    return Objects(boxes, names, tuple(found.scores.tolist()), _right(boxes, names, truth))


def _right(
    boxes: tuple[tuple[float, ...], ...], names: Sequence[str], truth: Objects
) -> tuple[bool, ...]:
    """Which detections, most certain first, find an object that none before has found."""
    if not names or not truth.names:
        return (False,) * len(names)
    overlaps = box_iou(torch.tensor(boxes), torch.tensor(truth.boxes_xyxy)).numpy()
    free = np.ones(len(truth.names), dtype=bool)
    verdicts = []
    for row, name in zip(overlaps, names, strict=True):
        same = np.array([other == name for other in truth.names])
        overlap = np.where(same & free, row, 0.0)
        best = int(overlap.argmax())
        verdicts.append(bool(overlap[best] >= SAME_OBJECT_IOU))
        free[best] &= not verdicts[-1]
    return tuple(verdicts)


def _content(image: Image.Image) -> tuple[bytes, Literal["image/png", "image/jpeg"]]:
    stored = io.BytesIO()
    if max(image.size) <= SHARP_SIDE:
        image.save(stored, "PNG", optimize=True)
        return stored.getvalue(), "image/png"
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    image.save(stored, "JPEG", quality=82)
    return stored.getvalue(), "image/jpeg"


def _boxes(boxes: NDArray[Any]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(side) for side in box) for box in boxes)
