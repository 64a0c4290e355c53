"""Multi-scale deformable attention (Zhu et al., arXiv 2010.04159, section 4.1).

Shapes: B images · N queries · H heads · V feature levels · P points per level · S memory tokens
of all levels · D width · E = D / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from d3etr.attention_maps import SampledMaps
from d3etr.structures import Levels, constant


@dataclass(frozen=True)
class Samples:
    """Where each head of each query looks, and how much.

    Attributes:
        locations: [B, N, H, V, P, 2] as (x, y), normalised to the padded feature level; samples
            may lie outside.
        weights: [B, N, H, V, P], their sum over V and P is 1.
    """

    locations: Tensor
    weights: Tensor

    def as_maps(self, padding: Tensor | None, levels: Levels) -> SampledMaps:
        """What attention is compared by, of one layer.

        Args:
            padding: [B, S] bool or None.
            levels: the V grids that S runs over.
        """
        return SampledMaps(
            self.locations.transpose(1, 2), self.weights.transpose(1, 2), levels, padding
        )


class DeformableAttention(nn.Module):
    """Each query reads a few locations around its reference, on every feature level.

    Args:
        width: D.
        heads: H.
        levels: V.
        points: P.
        sampling: ``bilinear``, or ``discrete``: the nearest cell (RT-DETRv2, arXiv 2407.17140).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        levels: int,
        points: int,
        sampling: Literal["bilinear", "discrete"] = "bilinear",
    ) -> None:
        super().__init__()
        self.sample = sample_values if sampling == "bilinear" else gather_values
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        hidden: Tensor,
        embedding: Tensor,
        *,
        reference: Tensor,
        padding: Tensor | None,
        levels: Levels,
        tokens: Tensor | None = None,
    ) -> tuple[Tensor, Samples]:
        """Read the memory.

        Args:
            hidden: [B, N, D].
            embedding: [B or 1, N, D], added for queries.
            reference: [B, N, V, 2] points or [B, N, V, 4] boxes, normalised to the padded level.
            padding: [B, S] bool, True for tokens that hold nothing, or None.
            levels: the V grids that S runs over.
            tokens: [B, S, D] memory; None: the states read each other, N is S.

        Returns:
            [B, N, D], and what was sampled.
        """
        samples = self._samples(hidden + embedding, reference, levels)
        value = self.value(hidden if tokens is None else tokens)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        return self.output(self.sample(value, samples, levels)), samples

    def _samples(self, query: Tensor, reference: Tensor, levels: Levels) -> Samples:
        shape = (*query.shape[:2], self.heads, self.levels, self.points)
        offsets = self.offsets(query).view(*shape, 2).float()
        weights = self.weights(query).view(*shape[:3], -1).float().softmax(-1).view(shape)
        anchor = reference[:, :, None, :, None].float()
        if reference.shape[-1] == 4:
            locations = anchor[..., :2] + offsets / self.points * anchor[..., 2:] * 0.5
        else:
            sizes = tuple(float(side) for h, w in levels for side in (w, h))
            cells = constant(sizes, torch.float32, query.device).view(-1, 1, 2)
            locations = anchor + offsets / cells
        return Samples(locations, weights)


def sample_values(value: Tensor, samples: Samples, levels: Levels) -> Tensor:
    """Weighted sum of bilinear samples; outside the levels is zero.

    Args:
        value: [B, S, D].
        samples: locations and weights.
        levels: the V grids that S runs over.

    Returns:
        [B, N, D].
    """
    images, queries, heads = samples.weights.shape[:3]
    grids = 2 * samples.locations.transpose(1, 2).flatten(0, 1) - 1  # [B*H, N, V, P, 2]
    parts = []
    for level, part in enumerate(torch.split(value, [h * w for h, w in levels], 1)):
        planes = part.view(images, -1, heads, part.shape[-1] // heads).permute(0, 2, 3, 1)
        planes = planes.reshape(images * heads, -1, *levels[level])
        sampled = functional.grid_sample(
            planes, grids[:, :, level].to(planes.dtype), align_corners=False
        )
        parts.append(sampled)  # [B*H, E, N, P]
    weights = samples.weights.transpose(1, 2).reshape(images * heads, 1, queries, -1)
    mixed = (torch.cat(parts, -1) * weights.to(value.dtype)).sum(-1)
    return mixed.view(images, -1, queries).transpose(1, 2)


def gather_values(value: Tensor, samples: Samples, levels: Levels) -> Tensor:
    """Weighted sum of the cells that samples lie in, or nearest to; as ``sample_values``.

    Places get no gradient.
    """
    images, queries, heads = samples.weights.shape[:3]
    channels = value.shape[-1] // heads
    parts = []
    for level, part in enumerate(torch.split(value, [h * w for h, w in levels], 1)):
        height, width = levels[level]
        x, y = samples.locations[:, :, :, level].detach().unbind(-1)  # [B, N, H, P]
        # Half a cell off the cell that it lies in, as in the official code.
        column = (x * width + 0.5).long().clamp(0, width - 1)
        row = (y * height + 0.5).long().clamp(0, height - 1)
        index = (row * width + column).permute(0, 2, 1, 3).reshape(images, heads, -1, 1)
        planes = part.view(images, -1, heads, channels).transpose(1, 2)
        found = planes.gather(2, index.expand(-1, -1, -1, channels))
        parts.append(found.view(images, heads, queries, -1, channels))
    weights = samples.weights.transpose(1, 2).reshape(images, heads, queries, 1, -1)
    mixed = weights.to(value.dtype) @ torch.cat(parts, 3)  # [B, H, N, 1, E]
    return mixed.squeeze(3).transpose(1, 2).flatten(2)


def initialise_deformable(attention: DeformableAttention) -> None:
    """Start with every head looking into a direction of its own, point by point further away.

    Args:
        attention: changed in place (official code, ``ms_deform_attn.py``).
    """
    nn.init.zeros_(attention.offsets.weight)
    nn.init.zeros_(attention.weights.weight)
    nn.init.zeros_(attention.weights.bias)
    angles = torch.arange(attention.heads) * (2 * math.pi / attention.heads)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, attention.points + 1)[None, None, :, None]
    bias = directions[:, None, None] * steps
    with torch.no_grad():
        attention.offsets.bias.copy_(bias.expand(-1, attention.levels, -1, -1).flatten())
    for linear in (attention.value, attention.output):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
