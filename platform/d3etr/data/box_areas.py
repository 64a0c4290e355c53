"""Areas of boxes in pixels, and what boxes have in common; PyTorch is not needed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def areas(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n] of boxes [n, 4] as x1, y1, x2, y2; 0 where a side is negative."""
    found: NDArray[np.float32] = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(-1)
    return found


def common_areas(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, m] of the intersections of boxes [n, 4] with boxes [m, 4]."""
    low = np.maximum(one[:, None, :2], other[:, :2])
    high = np.minimum(one[:, None, 2:], other[:, 2:])
    found: NDArray[np.float32] = (high - low).clip(min=0).prod(-1)
    return found
