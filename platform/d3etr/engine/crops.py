"""Square crops of a split's objects and of what lies between them, for classification."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from d3etr.config.training import PretrainingConfig
from d3etr.data.images import load_image, to_pixels
from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit
from d3etr.progress import OnProgress

MARGIN = 1.4
"""Crops are cut this much larger than they are used, so that they can be shifted and scaled."""
_TRIES = 20
_FREE = 0.1
"""A background crop may cover this share of an object, and no more."""

Window = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Crops:
    """Crops in memory.

    Attributes:
        pixels: [n, 3, side, side] uint8.
        labels: [n] in [0, C]; C is background.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def cut_crops(
    split: DetectionSplit,
    config: PretrainingConfig,
    seed: int,
    on_progress: OnProgress | None = None,
) -> Crops:
    """Cut objects and backgrounds out of a split; each image is decoded once.

    Args:
        split: images and boxes.
        config: sizes and numbers.
        seed: of the choice of objects (where there are too many) and of backgrounds.
        on_progress: told after every image.

    Raises:
        UserError: an image cannot be read.
    """
    side = round(config.crop_size * MARGIN)
    random = Random(f"crops/{seed}")
    share = _share_kept(split, config)
    background = len(split.categories)
    pixels: list[Tensor] = []
    labels: list[int] = []
    for number, record in enumerate(split.records, start=1):
        windows = _windows(record, config, share, background, random)
        if windows:
            image = load_image(split.path(record), (record.width, record.height))
            pixels += [_cut(image, window, side) for window, _ in windows]
            labels += [label for _, label in windows]
        if on_progress is not None:
            on_progress(f"crops of {split.name}", number, len(split.records))
    empty = torch.zeros(0, 3, side, side, dtype=torch.uint8)
    return Crops(torch.stack(pixels) if pixels else empty, torch.tensor(labels, dtype=torch.int64))


def _share_kept(split: DetectionSplit, config: PretrainingConfig) -> float:
    objects = sum(len(record.objects()[0]) for record in split.records)
    return min(1.0, config.maximum_crops / max(1.0, objects * (1 + config.backgrounds)))


def _windows(
    record: ImageRecord, config: PretrainingConfig, share: float, background: int, random: Random
) -> list[tuple[Window, int]]:
    """What is cut out of one image, with labels."""
    labels, boxes = record.objects()
    scale = (1 + config.context) * MARGIN
    found = []
    for label, box in zip(labels.tolist(), boxes.tolist(), strict=True):
        side = max(box[2] - box[0], box[3] - box[1]) * scale
        centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        if random.random() < share:
            found.append((_inside(*centre, side, record), label))
        if random.random() < share * config.backgrounds:
            window = _background(record, boxes, side, random)
            found += [] if window is None else [(window, background)]
    return found


def _inside(x: float, y: float, side: float, record: ImageRecord) -> Window:
    """A square around (x, y), moved (and where it must be, shrunk) into the image."""
    side = min(side, record.width, record.height)
    left = min(max(x - side / 2, 0.0), record.width - side)
    top = min(max(y - side / 2, 0.0), record.height - side)
    return left, top, left + side, top + side


def _background(
    record: ImageRecord, boxes: NDArray[np.float64], side: float, random: Random
) -> Window | None:
    """A random window (of an object's size) that hardly touches any object."""
    for _ in range(_TRIES):
        x, y = random.random() * record.width, random.random() * record.height
        window = _inside(x, y, side, record)
        # The margin is cut off again before the backbone sees the crop.
        middle = _inside(
            (window[0] + window[2]) / 2, (window[1] + window[3]) / 2, side / MARGIN, record
        )
        if _largest_cover(np.array(middle), boxes) <= _FREE:
            return window
    return None


def _largest_cover(window: NDArray[np.float64], boxes: NDArray[np.float64]) -> float:
    """Largest share of any object that the window covers."""
    low, high = np.maximum(boxes[:, :2], window[:2]), np.minimum(boxes[:, 2:], window[2:])
    shared = (high - low).clip(0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return float((shared / np.maximum(areas, 1e-6)).max(initial=0.0))


def _cut(image: Image.Image, window: Window, side: int) -> Tensor:
    """[3, side, side] uint8: antialiased, at fractions of pixels."""
    crop = image.resize((side, side), Image.Resampling.BILINEAR, box=window)
    return to_pixels(crop)
