"""Memory distillation under object masks (CLoCKDistill, arXiv 2502.10683).

The paper's, as a third-party port quotes it: squared differences of memory tokens, inside objects
divided by the object's area, outside by the number of tokens there, each with a weight of its own.
Our choices: a token is inside where its cell touches the object's box; of objects that overlap the
smaller one counts; each feature level is a map of its own.

Shapes: B images · T objects · S memory tokens · D' channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from d3etr.matching.boxes import cxcywh_to_xyxy
from d3etr.structures import Levels, Targets


def object_shares(
    targets: Targets, padding: Tensor | None, levels: Levels
) -> tuple[Tensor, Tensor]:
    """How much each token counts inside objects, and outside.

    Args:
        targets: ground truth; boxes are relative to the image without padding.
        padding: [B, S] bool, True under padding, or None.
        levels: (height, width) of each feature level.

    Returns:
        [B, S] inside: 1 / number of cells of the smallest object that covers the token, else 0, so
        that an object that no other overlaps counts 1 on each level; [B, S] outside: 1 / number of
        tokens outside all objects of the level, else 0; both 0 under padding.
    """
    parts = [height * width for height, width in levels]
    if padding is None:
        padding = targets.boxes_cxcywh.new_zeros(len(targets.counts), sum(parts)).bool()
    inside, outside = [], []
    for grid, hidden in zip(levels, torch.split(padding, parts, 1), strict=True):
        visible = ~hidden
        share = _inside(targets, visible.view(-1, *grid))
        inside.append(share)
        rest = visible & (share == 0)
        outside.append(rest / rest.sum(1, keepdim=True).clamp(min=1))
    return torch.cat(inside, 1), torch.cat(outside, 1)


def _inside(targets: Targets, visible: Tensor) -> Tensor:
    """[B, h * w] of one level, whose ``visible`` cells [B, h, w] are the image."""
    sides = visible[:, :, 0].sum(1), visible[:, 0].sum(1)
    left, top, right, bottom = cxcywh_to_xyxy(targets.boxes_cxcywh).unbind(-1)
    rows, height = _covered(top, bottom, sides[0], visible.shape[1])
    columns, width = _covered(left, right, sides[1], visible.shape[2])
    slots = torch.arange(targets.labels.shape[1], device=visible.device)
    exists = slots < targets.num_objects[:, None]
    share = (exists / (height * width))[..., None, None]
    covered = (rows[..., :, None] & columns[..., None, :]) * share
    # A batch may have no object at all.
    return pad(covered.flatten(2), (0, 0, 0, 1)).amax(1)


def _covered(low: Tensor, high: Tensor, cells: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which cells of one axis intervals in [0, 1] touch, and how many; at least one.

    Args:
        low: [B, T].
        high: [B, T].
        cells: [B] of the axis that are the image.
        size: of the axis.

    Returns:
        [B, T, size] bool and [B, T].
    """
    cells = cells[:, None].to(low)
    first = torch.minimum((low * cells).floor(), cells - 1).clamp(min=0)
    end = torch.maximum(torch.minimum((high * cells).ceil(), cells), first + 1)
    index = torch.arange(size, device=low.device)
    return (index >= first[..., None]) & (index < end[..., None]), end - first


def weighted_distance(tokens: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Sum over images, tokens and channels of weighted squared differences.

    Args:
        tokens: [B, S, D'] of the student, with the teacher's width.
        teacher: [B, S, D'].
        weights: [B, S].

    Returns:
        Scalar.
    """
    return ((tokens.float() - teacher.float()).square().sum(-1) * weights).sum()
