"""Box formats, IoU and generalised IoU.

Boxes are [..., 4]; ``cxcywh`` is centre and size, ``xyxy`` two corners, both in [0, 1] of the
image. All functions broadcast over leading dimensions and are safe for boxes of zero size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Areas below this are treated as zero: two float32 corners closer than this square root are one
# point. Adding an epsilon to the union instead would pull giou(b, b) of a small box below 1.
_SMALLEST_AREA = 1e-14


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size [..., 4] to corners [..., 4]."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def coordinates(boxes: Tensor) -> tuple[Tensor, ...]:
    """[..., 4] to four of [...], each contiguous, which makes many pairs of boxes fast.

    Operations on [..., N, M, 2] would have inner loops of two numbers.
    """
    return boxes.movedim(-1, 0).contiguous().unbind(0)


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
    return _generalised_iou(coordinates(first), coordinates(second))


def _generalised_iou(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    overlap, union = _overlap_and_union(first, second)
    (left, top, right, bottom), (left_, top_, right_, bottom_) = first, second
    width = torch.maximum(right, right_) - torch.minimum(left, left_)
    height = torch.maximum(bottom, bottom_) - torch.minimum(top, top_)
    enclosure = width * height
    return _ratio(overlap, union) - _ratio(enclosure - union, enclosure)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of boxes that broadcast against each other.

    Args:
        first: [..., 4] xyxy.
        second: [..., 4] xyxy, broadcastable against ``first``.

    Returns:
        [...] in [0, 1].
    """
    return _ratio(*_overlap_and_union(coordinates(first), coordinates(second)))


def _overlap_and_union(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    (left, top, right, bottom), (left_, top_, right_, bottom_) = first, second
    width = (torch.minimum(right, right_) - torch.maximum(left, left_)).clamp(min=0)
    height = (torch.minimum(bottom, bottom_) - torch.maximum(top, top_)).clamp(min=0)
    areas = (right - left) * (bottom - top), (right_ - left_) * (bottom_ - top_)
    overlap = width * height
    return overlap, areas[0] + areas[1] - overlap


def pairwise_generalised_iou(first: Tensor, second: Tensor) -> Tensor:
    """GIoU of every pair: [..., N, 4] and [..., M, 4] xyxy to [..., N, M]."""
    rows = [part[..., :, None] for part in coordinates(first)]
    return _generalised_iou(rows, [part[..., None, :] for part in coordinates(second)])
