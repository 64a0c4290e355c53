"""Four images in one, as YOLOX and DEIM train with them.

The images touch at one point near the centre of a canvas that has the size of the result, each in
its own shape and as large as a quarter of the canvas holds, times one factor; what is beyond the
canvas is cut off. Centre and factor have the ranges of DEIM's affine transform (translation 0.1,
scale 0.5 to 1.5), without its rotation: upright boxes would no longer be their objects'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d3etr.data.records import ImageRecord
from d3etr.data.transforms import resize

IMAGES = 4
_FILL = 114
"""Grey where no image is (YOLOX, DEIM)."""
_SCALES, _SHIFT = (0.5, 1.5), 0.1
_SMALLEST_BOX = 1.0
"""Pixels of each side that must be left of an object."""


@dataclass(frozen=True)
class Tile:
    """One whole image on the canvas, which may reach beyond it.

    Attributes:
        index: of the image.
        top: row of its upper edge, pixels.
        left: column of its left edge, pixels.
        height: pixels.
        width: pixels.
    """

    index: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Mosaic:
    """A canvas and what is on it.

    Attributes:
        size: (height, width) in pixels.
        tiles: four.
    """

    size: tuple[int, int]
    tiles: tuple[Tile, ...]

    @property
    def images(self) -> tuple[int, ...]:
        """The index of each tile's image."""
        return tuple(tile.index for tile in self.tiles)


def draw_mosaic(
    records: Sequence[ImageRecord], index: int, size: tuple[int, int], generator: Random
) -> Mosaic:
    """Draw three images beside one, and where all four are.

    Args:
        records: what they are drawn from, with equal chances.
        index: the one that is among them in any case.
        size: (height, width) of the canvas, pixels.
        generator: what is drawn from.
    """
    chosen = [index, *(int(generator.random() * len(records)) for _ in range(IMAGES - 1))]
    generator.shuffle(chosen)
    factor = _SCALES[0] + (_SCALES[1] - _SCALES[0]) * generator.random()
    shift = [_SHIFT * (2 * generator.random() - 1) for _ in range(2)]
    y, x = (round(side * (0.5 + part)) for side, part in zip(size, shift, strict=True))
    tiles = []
    for place, number in enumerate(chosen):
        record = records[number]
        scale = factor / 2 * min(size[0] / record.height, size[1] / record.width)
        rows, columns = max(1, round(scale * record.height)), max(1, round(scale * record.width))
        top, left = (y - rows if place < 2 else y), (x if place % 2 else x - columns)
        tiles.append(Tile(number, top, left, rows, columns))
    return Mosaic(size, tuple(tiles))


def compose(images: Sequence[Tensor], mosaic: Mosaic) -> Tensor:
    """[3, *mosaic.size] uint8 of four images [3, h, w] uint8, in the order of the tiles."""
    height, width = mosaic.size
    canvas = torch.full((3, height, width), _FILL, dtype=torch.uint8)
    for image, tile in zip(images, mosaic.tiles, strict=True):
        shown = resize(image, (tile.height, tile.width))
        top, left = max(0, tile.top), max(0, tile.left)
        bottom, right = min(height, tile.top + tile.height), min(width, tile.left + tile.width)
        rows = slice(top - tile.top, bottom - tile.top)
        columns = slice(left - tile.left, right - tile.left)
        canvas[:, top:bottom, left:right] = shown[:, rows, columns]
    return canvas


def boxes_on(
    boxes_xyxy: Sequence[NDArray[np.float64]], records: Sequence[ImageRecord], mosaic: Mosaic
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Where boxes of the four images are on the canvas.

    Args:
        boxes_xyxy: [n, 4] of each tile's image, pixels of that.
        records: the images.
        mosaic: the canvas.

    Returns:
        [N, 4] of all of them, pixels, clipped to the canvas, and [N] bool: False where less than a
        pixel is left of a side.
    """
    limits = np.array([*mosaic.size[::-1]] * 2, dtype=np.float64)
    moved = []
    for boxes, record, tile in zip(boxes_xyxy, records, mosaic.tiles, strict=True):
        scale = np.array([tile.width / record.width, tile.height / record.height] * 2)
        moved.append(np.clip(boxes * scale + [tile.left, tile.top] * 2, 0.0, limits))
    together = np.concatenate(moved)
    return together, (together[:, 2:] - together[:, :2] >= _SMALLEST_BOX).all(1)
