"""Bilinear samples by gathers, for runtimes that have no ``GridSample`` or a wrong one.

Shapes: B images · N queries · H heads · P points of a level · E channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d3etr.detectors.deformable_attention import (
    DeformableAttention,
    Samples,
    UnevenDeformableAttention,
    sample_values,
)
from d3etr.structures import Levels


def sampling_modules(detector: nn.Module) -> list[DeformableAttention | UnevenDeformableAttention]:
    """What samples bilinearly within a detector."""
    kinds = (DeformableAttention, UnevenDeformableAttention)
    return [x for x in detector.modules() if isinstance(x, kinds) and x.sample is sample_values]


def gather_bilinear(value: Tensor, samples: Samples, levels: Levels) -> Tensor:
    """As ``sample_values``, of which it differs by rounding only.

    Args:
        value: [B, S, D].
        samples: locations and weights.
        levels: the V grids that S runs over.

    Returns:
        [B, N, D].
    """
    images, queries, heads = samples.weights.shape[:3]
    parts = []
    for level, part in enumerate(torch.split(value, [h * w for h, w in levels], 1)):
        rows = part.unflatten(-1, (heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
        places, weights = samples.of_level(level)
        places, weights = (x.transpose(1, 2).to(value.dtype) for x in (places, weights))
        parts.append(_of_level(rows, places, weights, levels[level]))
    mixed = torch.stack(parts).sum(0)  # [B, H, N, E]
    return mixed.transpose(1, 2).reshape(images, queries, -1)


def _of_level(rows: Tensor, places: Tensor, weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, H, N, E] weighted sums of one level.

    Args:
        rows: [B, H, h w, E].
        places: [B, H, N, P, 2] as (x, y).
        weights: [B, H, N, P].
        grid: (h, w).
    """
    height, width = grid
    x, y = places[..., 0] * width - 0.5, places[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    indices, shares = [], []
    for down, row_share in ((0, 1 - bottom_share), (1, bottom_share)):
        for aside, column_share in ((0, 1 - right_share), (1, right_share)):
            row, column = top + down, left + aside
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            cell = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            indices.append(cell.long())
            shares.append(row_share * column_share * inside * weights)
    index, share = torch.stack(indices, -1).flatten(3), torch.stack(shares, -1).flatten(3)
    # One gather of whole rows of all images and heads: runtimes copy a row at once.
    images, heads, cells, channels = rows.shape
    begin = torch.arange(images * heads, device=rows.device).view(images, heads, 1, 1) * cells
    flat = rows.reshape(images * heads * cells, channels)
    found = flat.index_select(0, (index + begin).flatten())
    found = found.view(*index.shape, channels)
    return (found * share[..., None]).sum(3)
