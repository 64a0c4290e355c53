"""Boxes as distributions over distances of their edges (D-FINE, Peng et al., arXiv 2410.13842).

A box's four edges move from those of a start box, each by the mean of a distribution over bins
whose distances are fine near 0 and coarse far away (equations 2 and 3).

Shapes: .. any · K bins · distances are in units of the start's side over the curvature c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d3etr.structures import constant


def bin_distances(bins: int, bound: float, curvature: float, device: torch.device) -> Tensor:
    """[K] distance that each bin stands for, rising, 0 in the middle.

    Args:
        bins: K, odd.
        bound: a; all but the outermost bins reach a times the side, those twice as far.
        curvature: c, how much finer they are in the middle.
        device: of the result.
    """
    half = bins // 2
    limit = bound * curvature
    step = (limit + 1) ** (2 / (bins - 3))
    right = [step**power - 1 for power in range(1, half)] + [2 * limit]
    values = [-value for value in reversed(right)] + [0.0] + right
    return constant(tuple(values), torch.float32, device)


def mean_distances(corners: Tensor, distances: Tensor) -> Tensor:
    """[.., 4] mean of each edge's distribution, of logits [.., 4, K] and the bins' [K]."""
    return corners.softmax(-1) @ distances


def moved_edges(start: Tensor, moves: Tensor, curvature: float) -> Tensor:
    """Boxes [.., 4] cxcywh from edges that moved outwards.

    Args:
        start: [.., 4] boxes cxcywh.
        moves: [.., 4] of left, top, right and bottom edge.
        curvature: c.
    """
    centre, side = start[..., :2], start[..., 2:]
    reach = (0.5 * curvature + moves) * (side / curvature).tile(2)
    low, high = centre - reach[..., :2], centre + reach[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def edge_moves(start: Tensor, boxes_xyxy: Tensor, curvature: float) -> Tensor:
    """[.., 4] how far each edge has to move for ``moved_edges`` to give a box.

    Args:
        start: [.., 4] boxes cxcywh.
        boxes_xyxy: [.., 4] what they should become.
        curvature: c.
    """
    centre, unit = start[..., :2], (start[..., 2:] / curvature).clamp(min=1e-16).tile(2)
    reach = torch.cat([centre - boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - centre], -1)
    return reach / unit - 0.5 * curvature
