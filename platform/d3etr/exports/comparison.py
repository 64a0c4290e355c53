"""Whether two programs detect the same: detections as sets, not as lists.

Rounding swaps detections of nearly one score, and decides which of them is the last among K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

BOX_TOLERANCE = 1e-4
"""Of the image's side, for float32."""
SCORE_TOLERANCE = 1e-3
TIE = 1e-3
"""Scores this close to the K-th one, as a share of it, may be among the K or not."""
_NEVER = 1e6


class Detected(NamedTuple):
    """Detections in B images.

    Attributes:
        boxes: [B, K, 4] as x1, y1, x2, y2 in pixels.
        scores: [B, K] in descending order.
        labels: [B, K].
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Comparison:
    """Of detections in a number of images.

    Attributes:
        images: how many.
        detections: how many that both have.
        box_difference: largest, as a share of the image's side.
        score_difference: largest.
        near_ties: those whose place a detection of nearly the same score took, the last one's.
        unmatched: detections that one of both has, without such a reason.
    """

    images: int = 0
    detections: int = 0
    box_difference: float = 0.0
    score_difference: float = 0.0
    near_ties: int = 0
    unmatched: int = 0

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.images + other.images,
            self.detections + other.detections,
            max(self.box_difference, other.box_difference),
            max(self.score_difference, other.score_difference),
            self.near_ties + other.near_ties,
            self.unmatched + other.unmatched,
        )

    @property
    def equal(self) -> bool:
        """Whether both detect the same, but for rounding."""
        small = self.box_difference <= BOX_TOLERANCE and self.score_difference <= SCORE_TOLERANCE
        return self.unmatched == 0 and small

    def __str__(self) -> str:
        ties = f", {self.near_ties} near-ties at the last place" if self.near_ties else ""
        lost = f", {self.unmatched} detections of one side only" if self.unmatched else ""
        return (
            f"boxes differ by {self.box_difference:.1e} of the image's side at most (allowed "
            f"{BOX_TOLERANCE:g}), scores by {self.score_difference:.1e} (allowed "
            f"{SCORE_TOLERANCE:g}){ties}{lost}"
        )


def compare(expected: Detected, found: Detected, sizes: Sequence[tuple[int, int]]) -> Comparison:
    """Compare the detections of B images.

    Args:
        expected: K of each image, and some behind them that rounding may put among the K.
        found: K of each image.
        sizes: (height, width) of each image in pixels.
    """
    total = Comparison()
    if expected.scores.shape[1] < found.scores.shape[1] or len(found.scores) != len(sizes):
        return Comparison(images=len(sizes), unmatched=found.scores.size)
    for index, size in enumerate(sizes):
        one, other = (Detected(*(part[index] for part in x)) for x in (expected, found))
        total += _compare_image(one, other, size)
    return total


def _compare_image(expected: Detected, found: Detected, size: tuple[int, int]) -> Comparison:
    count = len(found.scores)
    if not np.isfinite(found.scores).all() or not np.isfinite(found.boxes).all():
        return Comparison(images=1, unmatched=count)
    height, width = size
    sides = np.array([width, height, width, height], dtype=np.float64)
    boxes = np.abs((expected.boxes[:, None].astype(np.float64) - found.boxes) / sides).max(-1)
    scores = np.abs(expected.scores[:, None].astype(np.float64) - found.scores)
    cost = np.maximum(boxes / BOX_TOLERANCE, scores / SCORE_TOLERANCE)
    cost[expected.labels[:, None] != found.labels] = _NEVER
    rows, columns = linear_sum_assignment(np.minimum(cost, _NEVER))
    same = cost[rows, columns] <= 1
    rows, columns = rows[same], columns[same]
    # Which of nearly equal scores is the last one, rounding decides: those alone may be exchanged.
    last = float(expected.scores[count - 1])
    missing = np.setdiff1d(np.arange(count), rows)
    exchanged = np.concatenate([missing, rows[rows >= count]])
    tied = np.abs(expected.scores[exchanged] - last) <= TIE * last
    return Comparison(
        images=1,
        detections=len(rows),
        box_difference=float(boxes[rows, columns].max(initial=0.0)),
        score_difference=float(scores[rows, columns].max(initial=0.0)),
        near_ties=int(tied[: len(missing)].sum()),
        unmatched=count - len(rows) + int((~tied).sum()),
    )
