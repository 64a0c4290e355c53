"""Box formats, IoU and generalised IoU.

Boxes are [..., 4]; ``cxcywh`` is centre and size, ``xyxy`` two corners, both in [0, 1] of the
image. All functions broadcast over leading dimensions and are safe for boxes of zero size.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Areas below this are treated as zero: two float32 corners closer than this square root are one
# point. Adding an epsilon to the union instead would pull giou(b, b) of a small box below 1.
_SMALLEST_AREA = 1e-14


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size [..., 4] to corners [..., 4]."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _area(sides: Tensor) -> Tensor:
    return sides[..., 0] * sides[..., 1]


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """The quotient, and 0 with a zero gradient where the whole is no area; NaN stays NaN."""
    positive = ~(whole <= _SMALLEST_AREA)
    return torch.where(positive, part / torch.where(positive, whole, 1.0), 0.0)


def generalised_iou(first: Tensor, second: Tensor) -> Tensor:
    """GIoU of boxes that broadcast against each other.

    Rezatofighi et al. 2019, equation 1: IoU - (enclosure - union) / enclosure.

    Args:
        first: [..., 4] xyxy.
        second: [..., 4] xyxy, broadcastable against ``first``.

    Returns:
        [...] in [-1, 1]; exactly 1 for equal boxes of non-zero size.
    """
    low, high = first[..., :2], first[..., 2:]
    other_low, other_high = second[..., :2], second[..., 2:]
    overlap, union = _overlap_and_union(first, second)
    enclosure = _area(torch.maximum(high, other_high) - torch.minimum(low, other_low))
    return _ratio(overlap, union) - _ratio(enclosure - union, enclosure)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of boxes that broadcast against each other.

    Args:
        first: [..., 4] xyxy.
        second: [..., 4] xyxy, broadcastable against ``first``.

    Returns:
        [...] in [0, 1].
    """
    return _ratio(*_overlap_and_union(first, second))


def _overlap_and_union(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    low, high = first[..., :2], first[..., 2:]
    other_low, other_high = second[..., :2], second[..., 2:]
    overlap = _area((torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0))
    return overlap, _area(high - low) + _area(other_high - other_low) - overlap


def pairwise_generalised_iou(first: Tensor, second: Tensor) -> Tensor:
    """GIoU of every pair: [..., N, 4] and [..., M, 4] xyxy to [..., N, M]."""
    return generalised_iou(first[..., :, None, :], second[..., None, :, :])
