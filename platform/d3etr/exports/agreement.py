"""How many detections two files share, where rounding is not all that they differ in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from d3etr.data.box_areas import areas, common_areas

IOU = 0.5
"""Two boxes of one class that overlap by this much are the same detection."""


@dataclass(frozen=True)
class Agreement:
    """Of the confident detections of two files in the same images.

    Attributes:
        images: how many.
        detections: of both files together.
        unmatched: of those, without a partner in the other file.
    """

    images: int = 0
    detections: int = 0
    unmatched: int = 0

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.images + other.images,
            self.detections + other.detections,
            self.unmatched + other.unmatched,
        )

    @property
    def share(self) -> float | None:
        """Of detections without a partner; None where nothing was detected."""
        return self.unmatched / self.detections if self.detections else None


Confident = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Boxes [n, 4] as x1, y1, x2, y2 and labels [n] of one image."""


def agreement(one: Confident, other: Confident) -> Agreement:
    """Pair the detections of one image, as many as possible, each with a partner of its own."""
    paired = (_overlaps(one[0], other[0]) >= IOU) & (one[1][:, None] == other[1])
    rows, columns = linear_sum_assignment(paired, maximize=True)
    total = len(one[1]) + len(other[1])
    return Agreement(1, total, total - 2 * int(paired[rows, columns].sum()))


def _overlaps(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """IoU [n, m] of boxes [n, 4] and [m, 4]."""
    common = common_areas(one, other)
    union = areas(one)[:, None] + areas(other) - common
    return np.asarray(common / np.maximum(union, np.finfo(np.float32).tiny), dtype=np.float32)
