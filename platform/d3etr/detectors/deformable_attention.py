"""Multi-scale deformable attention (Zhu et al., arXiv 2010.04159, section 4.1).

Shapes: B images · N queries · H heads · V feature levels · P points per level · S memory tokens
of all levels · D width · E = D / H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
        counts: locations of each level, where levels have different numbers of them; those behind
            have no weight. None: all have P.
    """

    locations: Tensor
    weights: Tensor
    counts: tuple[int, ...] | None = None

    def of_level(self, level: int) -> tuple[Tensor, Tensor]:
        """Locations [B, N, H, p, 2] and weights [B, N, H, p] of one level."""
        kept = self.locations.shape[4] if self.counts is None else self.counts[level]
        return self.locations[:, :, :, level, :kept], self.weights[:, :, :, level, :kept]

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
        return Samples(_locations(reference, offsets, self.points, levels), weights)


class UnevenDeformableAttention(nn.Module):
    """Of D-FINE: levels have numbers of locations of their own, and values are the tokens.

    (Peng et al., arXiv 2410.13842, the official code.)

    Args:
        width: D.
        heads: H.
        points: of each level.
    """

    def __init__(self, width: int, heads: int, points: tuple[int, ...]) -> None:
        super().__init__()
        self.sample = sample_values
        self.heads, self.levels, self.points = heads, len(points), points
        self.offsets = nn.Linear(width, heads * sum(points) * 2)
        self.weights = nn.Linear(width, heads * sum(points))

    def forward(
        self,
        hidden: Tensor,
        embedding: Tensor,
        *,
        reference: Tensor,
        padding: Tensor | None,
        levels: Levels,
        tokens: Tensor,
    ) -> tuple[Tensor, Samples]:
        """Read the memory; arguments and result as of ``DeformableAttention``."""
        query = hidden + embedding
        shape = (*query.shape[:2], self.heads, sum(self.points))
        offsets = self._by_level(self.offsets(query).view(*shape, 2).float())
        weights = self._by_level(self.weights(query).view(shape).float().softmax(-1)[..., None])
        count = constant(tuple(map(float, self.points)), torch.float32, query.device)
        places = _locations(reference, offsets, count.view(-1, 1, 1), levels)
        samples = Samples(places, weights.squeeze(-1), self.points)
        if padding is not None:
            tokens = tokens.masked_fill(padding[..., None], 0.0)
        return self.sample(tokens, samples, levels), samples

    def _by_level(self, values: Tensor) -> Tensor:
        """[B, N, H, sum of points, X] to [B, N, H, V, P, X], zeros behind a level's own."""
        parts = torch.split(values, [*self.points], 3)
        most = max(self.points)
        return torch.stack([functional.pad(x, (0, 0, 0, most - x.shape[3])) for x in parts], 3)


def _locations(reference: Tensor, offsets: Tensor, count: int | Tensor, levels: Levels) -> Tensor:
    """[B, N, H, V, P, 2] places as (x, y) on the padded levels.

    Args:
        reference: [B, N, V, 2] points or [B, N, V, 4] boxes.
        offsets: [B, N, H, V, P, 2] in cells from points; from boxes in halves of their sides, times
            ``count``.
        count: P, of each level where they differ.
        levels: the V grids.
    """
    anchor = reference[:, :, None, :, None].float()
    if reference.shape[-1] == 4:
        return anchor[..., :2] + offsets / count * anchor[..., 2:] * 0.5
    return anchor + offsets / _sides(levels, offsets.device)


def _sides(levels: Levels, device: torch.device) -> Tensor:
    """[V, 1, 2] float32 (width, height) of each level in cells."""
    sides = [side for h, w in levels for side in (w, h)]
    if torch.compiler.is_exporting():  # a constant would be that of the example's size for ever
        parts = [torch.full((), side, dtype=torch.float32, device=device) for side in sides]
        return torch.stack(parts).view(-1, 1, 2)
    return constant(tuple(map(float, sides)), torch.float32, device).view(-1, 1, 2)


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
    parts, shares = [], []
    for level, part in enumerate(torch.split(value, [h * w for h, w in levels], 1)):
        planes = part.view(images, -1, heads, part.shape[-1] // heads).permute(0, 2, 3, 1)
        planes = planes.reshape(images * heads, -1, *levels[level])
        places, weights = samples.of_level(level)
        grid = 2 * places.transpose(1, 2).flatten(0, 1) - 1  # [B*H, N, p, 2]
        parts.append(bilinear_samples(planes, grid))
        shares.append(weights)  # beside [B*H, E, N, p]
    weights = torch.cat(shares, -1).transpose(1, 2).reshape(images * heads, queries, -1)
    mixed = _mixed(weights.to(value.dtype), parts)
    return mixed.view(images, -1, queries).transpose(1, 2)


def bilinear_samples(planes: Tensor, grid: Tensor, padding: str = "zeros") -> Tensor:
    """Samples [R, E, N, p] of planes [R, E, h, w], in their type.

    Places keep all their digits: bfloat16's 8 bits miss them by up to a twelfth of a cell of 80.

    Args:
        planes: of any floating type.
        grid: [R, N, p, 2] float32 as (x, y) in [-1, 1].
        padding: as of ``grid_sample``.
    """
    precise = torch.promote_types(planes.dtype, grid.dtype)
    found = functional.grid_sample(
        planes.to(precise), grid.to(precise), padding_mode=padding, align_corners=False
    )
    return found.to(planes.dtype)


def _mixed(weights: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """[R, E, N], samples [R, E, N, p] of all levels weighted by [R, N, sum of p] and added up."""
    if weights.device.type == "cpu" and torch.is_grad_enabled():
        mixed: Tensor = _Mixing.apply(weights, *parts)
        return mixed
    return _weighted_sum(weights, parts)


def _weighted_sum(weights: Tensor, parts: Sequence[Tensor]) -> Tensor:
    return (torch.cat([*parts], -1) * weights[:, None]).sum(-1)


class _Mixing(torch.autograd.Function):
    """``_weighted_sum`` for a CPU: backward goes channel by channel, in what the cache holds.

    PyTorch's own would store the product of all samples with a gradient three times.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *parts)
        return _weighted_sum(weights, parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        weights, *parts = ctx.saved_tensors
        by_weights, by_parts = [], []
        for part, share in zip(
            parts, weights.split([part.shape[-1] for part in parts], -1), strict=True
        ):
            by_part, by_share = torch.empty_like(part), torch.zeros_like(share)
            for channel, slope in enumerate(gradient.unbind(1)):
                torch.mul(slope[..., None], share, out=by_part[:, channel])
                by_share.addcmul_(slope[..., None], part[:, channel])
            by_parts.append(by_part)
            by_weights.append(by_share)
        return torch.cat(by_weights, -1), *by_parts


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


def initialise_deformable(attention: DeformableAttention | UnevenDeformableAttention) -> None:
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
    points = attention.points
    each = (points,) * attention.levels if isinstance(points, int) else points
    steps = torch.cat([torch.arange(1, count + 1) for count in each])
    with torch.no_grad():
        attention.offsets.bias.copy_((directions[:, None] * steps[:, None]).flatten())
    if isinstance(attention, UnevenDeformableAttention):
        return
    for linear in (attention.value, attention.output):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
