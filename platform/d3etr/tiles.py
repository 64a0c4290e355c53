"""Large pictures in overlapping tiles: where they lie, and one set of detections from all of them.

Rules and thresholds are our choice.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d3etr.data.box_areas import areas, common_areas

SAME = 0.5
"""Boxes of one class from two windows with at least this IoU are one object's; a box that a tile
cuts off is a part of another one that has at least this share of its area."""
_EDGE_PIXELS, _EDGE_SHARE = 2.0, 0.01
"""A box touches an edge from so many pixels on, or that share of the window's side."""


class Window(NamedTuple):
    """A part of a picture, in its pixels; ``right`` and ``bottom`` lie just outside."""

    left: int
    top: int
    right: int
    bottom: int


def windows_of(width: int, height: int, tile: tuple[int, int], overlap: float) -> list[Window]:
    """The whole picture, and evenly spread tiles that cover it.

    Args:
        width: of the picture, pixels.
        height: likewise.
        tile: (height, width) of a tile.
        overlap: share of a tile's side that neighbours have in common at least, in [0, 1).

    Returns:
        The picture alone where it fits one tile.
    """
    whole = Window(0, 0, width, height)
    rows, columns = _starts(height, tile[0], overlap), _starts(width, tile[1], overlap)
    if len(rows) == len(columns) == 1:
        return [whole]
    tiles = [
        Window(left, top, min(left + tile[1], width), min(top + tile[0], height))
        for top, left in product(rows, columns)
    ]
    return [whole, *tiles]


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    if side <= tile:
        return [0]
    count = math.ceil((side - tile) / max(1.0, tile * (1 - overlap))) + 1
    return [round(index * (side - tile) / (count - 1)) for index in range(count)]


def cut_off(
    boxes: NDArray[np.float32], window: Window, width: int, height: int
) -> NDArray[np.bool_]:
    """Which boxes [K, 4] touch an edge of a window that is none of the picture's: [K].

    Args:
        boxes: x1, y1, x2, y2 in the picture's pixels.
        window: that they were found in.
        width: of the picture, pixels.
        height: likewise.
    """
    x, y = (
        max(_EDGE_PIXELS, _EDGE_SHARE * side)
        for side in (window.right - window.left, window.bottom - window.top)
    )
    return (
        ((boxes[:, 0] <= window.left + x) & (window.left > 0))
        | ((boxes[:, 1] <= window.top + y) & (window.top > 0))
        | ((boxes[:, 2] >= window.right - x) & (window.right < width))
        | ((boxes[:, 3] >= window.bottom - y) & (window.bottom < height))
    )


def merge(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    windows: NDArray[np.int64],
    cut: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """Which detections of all windows stay, most certain first.

    Boxes that no tile cuts off come first, by score, then the others. A box goes where one that
    stays, of its class and another window, has an IoU of ``SAME`` with it, or, if a tile cuts it
    off, ``SAME`` of its area. Detections of one window never suppress each other: a detector of
    sets gives each object once.

    Args:
        boxes: [K, 4] in the picture's pixels.
        scores: [K].
        labels: [K].
        windows: [K] index of the window of each.
        cut: [K] from ``cut_off``.
    """
    sizes = areas(boxes)
    stay: list[int] = []
    for index in np.lexsort((-scores, cut)):
        others = np.array(stay, dtype=np.int64)
        rivals = others[(labels[others] == labels[index]) & (windows[others] != windows[index])]
        [common] = common_areas(boxes[index][None], boxes[rivals])
        iou = common / np.maximum(sizes[rivals] + sizes[index] - common, 1e-9)
        within = common / max(float(sizes[index]), 1e-9)
        if not np.any((iou >= SAME) | (cut[index] & (within >= SAME))):
            stay.append(int(index))
    return np.array(sorted(stay, key=lambda index: -scores[index]), dtype=np.int64)
