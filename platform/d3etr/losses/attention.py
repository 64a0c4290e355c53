"""Distillation of self- and cross-attention maps of corresponding queries.

That both kinds of maps are distilled over matched queries is D3ETR's; the distance is our
choice: KL per query row and head by default.

Shapes: L layers · B images · H heads · P pairs · K keys · S tokens of the student's memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, log_softmax

from d3etr.attention_maps import MASKED_SCORE, CrossMaps, ProductMaps, SampledMaps, ScoredMaps
from d3etr.config.distillation import AttentionConfig
from d3etr.kernels.availability import runs_kernels
from d3etr.losses.product_divergence import product_divergence
from d3etr.losses.splatted_divergence import splatted_divergence
from d3etr.structures import Levels

_TINY = torch.finfo(torch.float32).tiny


def resize_maps(
    teacher: CrossMaps,
    levels: Levels,
    hidden: Tensor | None,
    target: Levels,
    padding: Tensor | None,
) -> ScoredMaps:
    """Teacher maps on the student's grids, over its valid tokens.

    Args:
        teacher: its rows of the pairs, over S' keys on ``levels``.
        levels: (height, width) of each of the teacher's feature levels.
        hidden: [B, S'] bool, True under the teacher's padding, or None.
        target: the student's levels, as many.
        padding: [B, S] bool, True under the student's padding, or None.

    Returns:
        Logarithms of the resized probabilities, [L, B, H, P, S].
    """
    maps = _resized(teacher.scores().softmax(-1), levels, target)
    if hidden is not None:
        # A cell at the border has the mean of what is visible there: padding would darken it.
        visible = (~hidden).float()[None, :, None, None]
        whole = _resized(torch.ones_like(visible), levels, target)
        maps = maps * whole / _resized(visible, levels, target).clamp(min=_TINY)
    maps = maps.clamp(min=_TINY).log()
    if padding is not None:
        maps = maps.masked_fill(padding[None, :, None, None], MASKED_SCORE)
    return ScoredMaps(maps)


def _resized(maps: Tensor, levels: Levels, target: Levels) -> Tensor:
    """[L, B, H, P, S'] on ``levels`` to [L, B, H, P, S] on ``target``."""
    parts = torch.split(maps, [height * width for height, width in levels], -1)
    pairs = zip(parts, levels, target, strict=True)
    return torch.cat([_resize_plane(part, grid, size) for part, grid, size in pairs], -1)


def _resize_plane(maps: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[L, B, H, P, s'] on ``grid`` to [L, B, H, P, s] on ``size``; mass follows the area."""
    planes = maps.reshape(-1, 1, *grid)
    resized: Tensor = interpolate(planes, size=size, mode="bilinear", antialias=True)
    share = grid[0] * grid[1] / (size[0] * size[1])
    return resized.reshape(*maps.shape[:4], -1) * share


def some_levels(maps: CrossMaps, levels: Levels, kept: Sequence[int]) -> ScoredMaps:
    """Maps over some of the feature levels; their rows sum to 1 again (our choice).

    Args:
        maps: [L, B, H, P, S] on ``levels``.
        levels: (height, width) of each feature level.
        kept: their numbers.
    """
    return ScoredMaps(of_levels(maps.scores(), levels, kept))


def of_levels(values: Tensor, levels: Levels, kept: Sequence[int]) -> Tensor:
    """[.., S] on ``levels`` to [.., S'] on some of them."""
    parts = torch.split(values, [height * width for height, width in levels], -1)
    return torch.cat([parts[level] for level in kept], -1)


def merged_maps(
    maps: CrossMaps, levels: Levels, grid: tuple[int, int], padding: Tensor | None
) -> ScoredMaps:
    """Maps of all feature levels added up on one grid (our choice).

    Args:
        maps: [L, B, H, P, S] on ``levels``.
        levels: (height, width) of each feature level.
        grid: (height, width), S' cells.
        padding: [B, S'] bool, True under padding, or None.

    Returns:
        Logarithms of the probabilities, [L, B, H, P, S'].
    """
    mass = maps.scores().softmax(-1)
    parts = torch.split(mass, [height * width for height, width in levels], -1)
    planes = [_resize_plane(part, size, grid) for part, size in zip(parts, levels, strict=True)]
    merged = torch.stack(planes).sum(0).clamp(min=_TINY).log()
    if padding is not None:
        merged = merged.masked_fill(padding[None, :, None, None], MASKED_SCORE)
    return ScoredMaps(merged)


def blurred_maps(
    maps: CrossMaps, levels: Levels, padding: Tensor | None, deviation: float
) -> ScoredMaps:
    """Maps smoothed by a Gaussian on each level's grid, over its valid cells (our choice).

    What leaves the grid at its border stays within it, what leaves into padding is lost.

    Args:
        maps: [L, B, H, P, S] on ``levels``.
        levels: (height, width) of each feature level.
        padding: [B, S] bool, True under padding, or None.
        deviation: of the Gaussian, in cells.

    Returns:
        Logarithms of the smoothed probabilities, [L, B, H, P, S].
    """
    mass = maps.scores().softmax(-1)
    parts = []
    for (height, width), part in zip(
        levels, torch.split(mass, [h * w for h, w in levels], -1), strict=True
    ):
        down, across = (_gaussian(side, deviation, part) for side in (height, width))
        plane = part.view(*part.shape[:-1], height, width)
        parts.append((down @ plane @ across.mT).flatten(-2))
    smooth = torch.cat(parts, -1).clamp(min=_TINY).log()
    if padding is not None:
        smooth = smooth.masked_fill(padding[None, :, None, None], MASKED_SCORE)
    return ScoredMaps(smooth)


def _gaussian(side: int, deviation: float, like: Tensor) -> Tensor:
    """[side, side] shares of each cell's mass (columns) that each cell (rows) gets."""
    cells = torch.arange(side, dtype=like.dtype, device=like.device)
    weights = (-0.5 * ((cells[:, None] - cells) / deviation).square()).exp()
    return weights / weights.sum(0)


class _RowDivergence(torch.autograd.Function):
    """KL(softmax(teacher) || softmax(scores)) of each row.

    Its gradient is the difference of both maps, which is all that is kept. Computed from
    log-softmax, never from the logarithm of a probability, which would underflow.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, teacher: Tensor) -> Tensor:
        student, target = log_softmax(scores, -1), log_softmax(teacher, -1)
        probability = target.exp()
        rows = target.sub_(student).mul_(probability).sum(-1)
        ctx.save_for_backward(student.exp_().sub_(probability))
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return gradient[..., None] * difference, None


def kl_rows(scores: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(scores)) of each row: [L, B, H, P]; the teacher is given."""
    rows: Tensor = _RowDivergence.apply(scores, teacher)
    return rows


def summed_maps(maps: CrossMaps) -> ScoredMaps:
    """One map for all queries: the mean of theirs, [L, B, H, P, K] to [L, B, H, 1, K].

    TPRD's D3ETR compares their sum. The mean has rows that sum to 1, as every other map does, and
    does not depend on the number of queries (our choice).
    """
    return ScoredMaps(_mean_of(maps.scores(), 3))


def _mean_of(scores: Tensor, dim: int) -> Tensor:
    """Logarithm of the mean probability over heads (2) or queries (3) of [L, B, H, P, K]."""
    return log_softmax(scores, -1).logsumexp(dim, keepdim=True) - math.log(scores.shape[dim])


def attention_loss(
    student: CrossMaps, teacher: CrossMaps, weights: Tensor, config: AttentionConfig
) -> Tensor:
    """Distance of attention maps: weighted sum over images and pairs, mean over heads.

    Over layers the mean or the sum, by configuration: our choice.

    Args:
        student: maps of the pairs, [L, B, H, P, K].
        teacher: the same of the teacher, [L, B, H', P, K].
        weights: [L, B, P] weight of each pair, already divided by its normaliser.
        config: distance, whether each head is compared (needs H = H') or their mean, and whether
            layers are averaged or added.

    Returns:
        Scalar.
    """
    weights = weights / (len(weights) if config.layers == "mean" else 1)
    plain = config.distance == "kl" and config.heads == "per_head"
    if plain and isinstance(student, ProductMaps) and isinstance(teacher, ProductMaps):
        return _of_products(student, teacher, weights)
    if plain and isinstance(student, SampledMaps) and isinstance(teacher, SampledMaps):
        if student.levels == teacher.levels:
            return (splatted_divergence(student, teacher).mean(2) * weights).sum()
    return (_distances(student.scores(), teacher.scores(), config).mean(2) * weights).sum()


def _of_products(student: ProductMaps, teacher: ProductMaps, weights: Tensor) -> Tensor:
    """Of maps that are stored nowhere."""
    if not runs_kernels(student.query.device):
        return product_divergence(student, teacher, weights)
    from d3etr.kernels.map_divergence import map_divergence

    return (map_divergence(student, teacher).mean(2) * weights).sum()


def _distances(scores: Tensor, target: Tensor, config: AttentionConfig) -> Tensor:
    """[L, B, H, P], or one head where they are averaged; sums over keys."""
    if config.heads == "mean":
        scores, target = _mean_of(scores, 2), _mean_of(target, 2)
    if config.distance == "mse":
        return (scores.softmax(-1) - target.softmax(-1)).square().sum(-1)
    return kl_rows(scores, target)
