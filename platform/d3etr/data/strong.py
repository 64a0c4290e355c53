"""SSD's augmentations, which RT-DETR and its kin train with: colours, a canvas, a chosen window.

Drawn as plain numbers, with the ranges of torchvision's RandomPhotometricDistort, RandomZoomOut and
RandomIoUCrop; torchvision's functions then apply them. Mosaics are drawn beside them, as an image
of a mosaic is neither zoomed out nor cropped (DEIM).

Source: Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from d3etr.config.data import AugmentationConfig
from d3etr.data.mosaic import Mosaic, draw_mosaic
from d3etr.data.records import ImageRecord

Window = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""

CHANNEL_ORDERS = tuple(permutations(range(3)))
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05)
_CANVAS = (1.0, 4.0)
_OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Least IoU of a window with an object; 1 leaves the image as it is."""
_TRIALS = 40
_SHARES, _ASPECTS = (0.3, 1.0), (0.5, 2.0)


@dataclass(frozen=True)
class Photometric:
    """Changes of colour, in this order; None changes nothing.

    Attributes:
        brightness: a factor.
        contrast: a factor.
        saturation: a factor.
        hue: turns.
        contrast_last: whether the contrast changes after hue, in place of after brightness.
        channels: the order of the colour channels.
    """

    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None
    contrast_last: bool = False
    channels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Strong:
    """What happens to an image before anything else, in this order; the defaults change nothing.

    Attributes:
        mosaic: the image is one of four on a canvas.
        photometric: colours.
        canvas: (height, width) of a black canvas, and (top, left) of the image on it, pixels.
        window: what is left, in pixels of the canvas.
    """

    mosaic: Mosaic | None = None
    photometric: Photometric | None = None
    canvas: tuple[int, int, int, int] | None = None
    window: Window | None = None

    @property
    def moves(self) -> bool:
        """Whether objects are elsewhere then."""
        return any(part is not None for part in (self.mosaic, self.canvas, self.window))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what becomes of an image of height x width pixels."""
        if self.mosaic is not None:
            return self.mosaic.size
        if self.window is not None:
            return self.window[2:]
        return (height, width) if self.canvas is None else self.canvas[:2]


UNCHANGED = Strong()
"""Of most recipes."""


@dataclass(frozen=True)
class Scene:
    """An image among the others of its split, which zoom-outs, crops and mosaics are drawn for.

    Attributes:
        records: of the split.
        index: the image's.
        canvas: (height, width) in pixels of a mosaic.
    """

    records: Sequence[ImageRecord]
    index: int
    canvas: tuple[int, int]


def draw_strong(config: AugmentationConfig, scene: Scene | None, generator: Random) -> Strong:
    """Draw what happens to an image; without a scene only its colours change.

    Each kind draws from a generator of its own, so that switching one on leaves the others' draws
    as they were.
    """
    colours, mosaics, canvases, windows = (Random(generator.getrandbits(64)) for _ in range(4))
    photometric = _draw_photometric(config.photometric, colours) if config.photometric else None
    if scene is None:
        return Strong(photometric=photometric)
    if mosaics.random() < config.mosaic:
        mosaic = draw_mosaic(scene.records, scene.index, scene.canvas, mosaics)
        return Strong(mosaic, photometric)
    record, canvas, window = scene.records[scene.index], None, None
    place = record.height, record.width, 0, 0
    if canvases.random() < config.zoom_out:
        canvas = place = _draw_canvas(record.height, record.width, canvases)
    if windows.random() < config.iou_crop:
        height, width, top, left = place
        _, boxes = record.objects()
        window = _draw_window((height, width), boxes + np.array([left, top] * 2), windows)
    return Strong(None, photometric, canvas, window)


def _draw_photometric(probability: float, generator: Random) -> Photometric | None:
    chance = [generator.random() for _ in range(11)]

    def factor(place: int, low: float, high: float) -> float | None:
        drawn = low + (high - low) * chance[place + 1]
        return drawn if chance[place] < probability else None

    permuted = chance[9] < probability
    return Photometric(
        brightness=factor(0, *_BRIGHTNESS),
        contrast=factor(2, *_CONTRAST),
        saturation=factor(4, *_SATURATION),
        hue=factor(6, *_HUE),
        contrast_last=chance[8] >= 0.5,
        channels=CHANNEL_ORDERS[int(chance[10] * len(CHANNEL_ORDERS))] if permuted else None,
    )


def _draw_canvas(height: int, width: int, generator: Random) -> tuple[int, int, int, int]:
    factor = _CANVAS[0] + (_CANVAS[1] - _CANVAS[0]) * generator.random()
    rows, columns = int(factor * height), int(factor * width)
    top = int((rows - height) * generator.random())
    return rows, columns, top, int((columns - width) * generator.random())


def _draw_window(
    size: tuple[int, int], boxes_xyxy: NDArray[np.float64], generator: Random
) -> Window | None:
    """A window that overlaps an object whose centre is in it as much as was drawn; None: all.

    Args:
        size: (height, width) of the image.
        boxes_xyxy: [n, 4] pixels, its objects.
        generator: what is drawn from.
    """
    if not len(boxes_xyxy):
        return None  # nothing that a window could be chosen by
    while (least := generator.choice(_OVERLAPS)) < 1:
        chance = np.array([generator.random() for _ in range(4 * _TRIALS)]).reshape(4, _TRIALS)
        low, high = _SHARES
        height, width = np.array(size)[:, None]
        rows = (height * (low + (high - low) * chance[0])).astype(np.int64)
        columns = (width * (low + (high - low) * chance[1])).astype(np.int64)
        top = ((height - rows) * chance[2]).astype(np.int64)
        left = ((width - columns) * chance[3]).astype(np.int64)
        windows = np.stack([top, left, rows, columns], 1)
        aspect = columns / np.maximum(rows, 1)
        usable = (rows > 0) & (columns > 0) & (aspect >= _ASPECTS[0]) & (aspect <= _ASPECTS[1])
        inside = _centres_inside(boxes_xyxy, windows)
        overlap = np.where(inside, _overlaps(boxes_xyxy, windows), -1.0).max(1)
        good = np.flatnonzero(usable & (overlap >= least))
        if len(good):
            found: list[int] = windows[good[0]].tolist()
            return found[0], found[1], found[2], found[3]
    return None


def _centres_inside(
    boxes_xyxy: NDArray[np.float64], windows: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """[W, n] whether the centres of boxes [n, 4] are in windows [W, 4] (``Window``)."""
    x, y = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]).T / 2
    top, left, rows, columns = windows.T[..., None]
    inside: NDArray[np.bool_] = (left < x) & (x < left + columns) & (top < y) & (y < top + rows)
    return inside


def _overlaps(boxes_xyxy: NDArray[np.float64], windows: NDArray[np.int64]) -> NDArray[np.float64]:
    """[W, n] IoU of windows [W, 4] (``Window``) and boxes [n, 4]."""
    low = windows[:, [1, 0]].astype(np.float64)
    high = low + windows[:, [3, 2]]
    shared = np.minimum(high[:, None], boxes_xyxy[:, 2:]) - np.maximum(
        low[:, None], boxes_xyxy[:, :2]
    )
    areas = shared.clip(0).prod(2)
    both = (high - low).prod(1)[:, None] + (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
    overlaps: NDArray[np.float64] = areas / np.maximum(both - areas, 1e-9)
    return overlaps


def change_pixels(pixels: Tensor, plan: Strong) -> Tensor:
    """[3, *plan.size(h, w)] uint8 of ``pixels`` [3, h, w] uint8, of the mosaic where one is."""
    if plan.photometric is not None:
        pixels = _distort(pixels.contiguous(), plan.photometric)
    if plan.canvas is None and plan.window is None:
        return pixels
    rows, columns, top, left = plan.canvas or (*pixels.shape[1:], 0, 0)
    # What torchvision cuts out beside an image is black: a window makes the canvas unnecessary.
    y, x, height, width = plan.window or (0, 0, rows, columns)
    cut: Tensor = functional.crop(pixels, y - top, x - left, height, width)
    return cut


def _distort(pixels: Tensor, plan: Photometric) -> Tensor:
    if plan.brightness is not None:
        pixels = functional.adjust_brightness(pixels, plan.brightness)
    if plan.contrast is not None and not plan.contrast_last:
        pixels = functional.adjust_contrast(pixels, plan.contrast)
    if plan.saturation is not None:
        pixels = functional.adjust_saturation(pixels, plan.saturation)
    if plan.hue is not None:
        pixels = functional.adjust_hue(pixels, plan.hue)
    if plan.contrast is not None and plan.contrast_last:
        pixels = functional.adjust_contrast(pixels, plan.contrast)
    if plan.channels is not None:
        pixels = pixels.index_select(0, torch.tensor(plan.channels))
    return pixels


def change_boxes(
    boxes: tv_tensors.BoundingBoxes, plan: Strong
) -> tuple[tv_tensors.BoundingBoxes, NDArray[np.bool_]]:
    """Where boxes [n, 4] (xyxy) of an image, or of its mosaic, are then, clipped to it.

    Returns:
        The boxes, and [n] bool: False where the centre is out of the window.
    """
    kept = np.ones(len(boxes), dtype=np.bool_)
    if plan.canvas is not None:
        rows, columns, top, left = plan.canvas
        height, width = boxes.canvas_size
        right, bottom = columns - width - left, rows - height - top
        boxes = functional.pad(boxes, [left, top, right, bottom])
    if plan.window is not None:
        kept = _centres_inside(boxes.numpy(), np.array([plan.window]))[0]
        boxes = functional.crop(boxes, *plan.window)
    return boxes, kept
