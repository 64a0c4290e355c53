"""Costs of all pairs of student and teacher queries in one pass.

Shapes: L layers · B images · N student queries · M teacher queries · C classes. Programs see the
L B problems as one dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 32, 64
"""Of a tile."""
WARPS = 4
"""Of each program."""
_SMALLEST_AREA = tl.constexpr(1e-14)
"""As in ``matching.boxes``."""


def pair_costs(
    boxes: Tensor,
    logits: Tensor,
    teacher_boxes: Tensor,
    teacher_logits: Tensor,
    *,
    class_cost: float,
    l1_cost: float,
    giou_cost: float,
) -> Tensor:
    """Weighted class (L2 of sigmoids), L1 and GIoU costs, as ``matching.costs`` defines them.

    Args:
        boxes: [L, B, N, 4] cxcywh.
        logits: [L, B, N, C].
        teacher_boxes: [L, B, M, 4] cxcywh.
        teacher_logits: [L, B, M, C].
        class_cost: weight of the distance of class probabilities.
        l1_cost: weight of the boxes' L1 distance.
        giou_cost: weight of 1 - GIoU.

    Returns:
        [L, B, N, M] float32.
    """
    layers, images, rows, classes = logits.shape
    columns = teacher_logits.shape[2]
    costs = logits.new_empty((layers, images, rows, columns), dtype=torch.float32)
    parts = (boxes, logits.sigmoid(), teacher_boxes, teacher_logits.sigmoid())
    grid = layers * images, triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
    if costs.numel():
        _costs[grid](
            *(part.contiguous() for part in parts),
            *(costs, rows, columns, classes, class_cost, l1_cost, giou_cost),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
        )
    return costs


@triton.jit  # type: ignore[untyped-decorator]
def _costs(
    boxes: tl.tensor,
    shares: tl.tensor,
    teacher_boxes: tl.tensor,
    teacher_shares: tl.tensor,
    costs: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    classes: tl.tensor,
    class_cost: tl.tensor,
    l1_cost: tl.tensor,
    giou_cost: tl.tensor,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
) -> None:
    """A tile of one problem."""
    problem = tl.program_id(0).to(tl.int64)
    mine = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    theirs = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    known, taught = mine < rows, theirs < columns
    places, teacher_places = problem * rows + mine, problem * columns + theirs

    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for index in range(0, classes):
        share = tl.load(shares + places * classes + index, mask=known, other=0.0)
        other = tl.load(teacher_shares + teacher_places * classes + index, mask=taught, other=0.0)
        distance = share.to(tl.float32)[:, None] - other.to(tl.float32)[None, :]
        squares += distance * distance
    cost = class_cost * tl.sqrt(squares)

    x, y, w, h = _sides(boxes, places, known)
    u, v, a, b = _sides(teacher_boxes, teacher_places, taught)
    distance = tl.abs(x[:, None] - u[None, :]) + tl.abs(y[:, None] - v[None, :])
    distance += tl.abs(w[:, None] - a[None, :]) + tl.abs(h[:, None] - b[None, :])
    cost += l1_cost * distance

    wide, across = _overlap(x, w, u, a)
    high, down = _overlap(y, h, v, b)
    shared, enclosure = wide * high, across * down
    union = (w * h)[:, None] + (a * b)[None, :] - shared
    giou = _ratio(shared, union) - _ratio(enclosure - union, enclosure)
    cost += giou_cost * (1 - giou)

    inside = known[:, None] & taught[None, :]
    tl.store(costs + places[:, None] * columns + theirs[None, :], cost, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _sides(
    boxes: tl.tensor, places: tl.tensor, inside: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Centre and size of boxes."""
    x = tl.load(boxes + places * 4, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(boxes + places * 4 + 1, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(boxes + places * 4 + 2, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(boxes + places * 4 + 3, mask=inside, other=0.0).to(tl.float32)
    return x, y, w, h


@triton.jit  # type: ignore[untyped-decorator]
def _overlap(
    centre: tl.tensor, size: tl.tensor, other: tl.tensor, width: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Length of what every two intervals share, at least 0, and of what encloses both."""
    low, high = (centre - size / 2)[:, None], (centre + size / 2)[:, None]
    first, last = (other - width / 2)[None, :], (other + width / 2)[None, :]
    shared = tl.maximum(tl.minimum(high, last) - tl.maximum(low, first), 0.0)
    return shared, tl.maximum(high, last) - tl.minimum(low, first)


@triton.jit  # type: ignore[untyped-decorator]
def _ratio(part: tl.tensor, whole: tl.tensor) -> tl.tensor:
    """The quotient, and 0 where the whole is no area."""
    nothing = whole <= _SMALLEST_AREA
    return tl.where(nothing, 0.0, part / tl.where(nothing, 1.0, whole))
