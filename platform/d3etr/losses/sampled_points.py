"""Distances between what two deformable attentions sample: weighted points, without a grid.

The energy distance of Szekely and Rizzo (2013) between point sets; that cross-attention is
compared by it is our choice. Maps of points that are more than a cell apart have nothing in common,
and their divergence says nothing about the way from one to the other; this distance does.

Shapes: L layers · B images · H heads · P pairs · K sampled points of a row, of all levels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from d3etr.attention_maps import SampledMaps
from d3etr.config.distillation import CrossAttentionConfig
from d3etr.structures import constant

SOFTENING = 0.01
"""Points closer than this, in longer sides of the image, are near enough (our choice)."""
_TINY = torch.finfo(torch.float32).tiny
_DISTANCES = 2**22
"""Distances that are computed at once."""


class _EnergyDistance(torch.autograd.Function):
    """2 E|x - y| - E|x - x'| - E|y - y'| of each row; only the student's points have a gradient.

    Rows are taken some at a time, and what is kept for the backward pass is the gradient itself:
    of K x K distances a row none stays.
    """

    @staticmethod
    def forward(
        ctx: Any, points: Tensor, weights: Tensor, others: Tensor, shares: Tensor
    ) -> Tensor:
        rows = max(1, _DISTANCES // max(points.shape[-2], others.shape[-2]) ** 2)
        given = points, weights, others, shares
        parts = [
            _some_rows(*part) for part in zip(*(torch.split(x, rows) for x in given), strict=True)
        ]
        energy, by_points, by_weights = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(by_points, by_weights)
        return energy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_points, by_weights = ctx.saved_tensors
        return gradient[:, None, None] * by_points, gradient[:, None] * by_weights, None, None


def _some_rows(
    points: Tensor, weights: Tensor, others: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Energy distance [R] with its gradients by the points [R, K, 2] and the weights [R, K].

    Args:
        points: [R, K, 2].
        weights: [R, K], 1 in each row.
        others: [R, K', 2].
        shares: [R, K'], likewise.
    """
    cross, pull = _mean_distances(points, others, shares)
    own, push = _mean_distances(points, points, weights)
    rest, _ = _mean_distances(others, others, shares)
    energy = (weights * (2 * cross - own)).sum(-1) - (shares * rest).sum(-1)
    return energy, 2 * weights[..., None] * (pull - push), 2 * (cross - own)


def _mean_distances(points: Tensor, others: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Of each point to the weighted others: the mean distance [R, K], its gradient [R, K, 2]."""
    between = points[:, :, None] - others[:, None]  # [R, K, K', 2]
    distance = (between.square().sum(-1) + SOFTENING**2).sqrt()
    mean = (distance @ shares[..., None])[..., 0]
    slope = ((shares[:, None] / distance)[..., None] * between).sum(2)
    return mean, slope


def energy_distance(points: Tensor, weights: Tensor, others: Tensor, shares: Tensor) -> Tensor:
    """Energy distance of weighted point sets, 0 where both are the same; of rows [...].

    Args:
        points: [..., K, 2], the student's, which have a gradient.
        weights: [..., K], of a row 1 in all.
        others: [..., K', 2], the teacher's.
        shares: [..., K'], likewise.
    """
    shape = weights.shape[:-1]
    flat = (
        points.flatten(0, -3),
        weights.flatten(0, -2),
        others.flatten(0, -3),
        shares.flatten(0, -2),
    )
    found: Tensor = _EnergyDistance.apply(*flat)
    return found.view(shape)


def point_loss(
    student: SampledMaps, teacher: SampledMaps, weights: Tensor, config: CrossAttentionConfig
) -> Tensor:
    """Point by point: KL of the weights, and L1 of the places weighted by the teacher's weights.

    For decoders of one origin, whose heads and points correspond by their number. Places are
    references plus offsets, in cells of the student's levels: where both look from the same
    reference, their L1 distance is that of the offsets (our choice).

    Args:
        student: of the pairs, [L, B, H, P, V, R, 2].
        teacher: the same of the teacher, with as many heads, levels and points.
        weights: [L, B, P] weight of each pair, already divided by its normaliser.
        config: whether layers are averaged or added.

    Returns:
        Scalar.
    """
    sides = tuple(float(side) for height, width in student.levels for side in (width, height))
    sizes = constant(sides, torch.float32, weights.device).view(-1, 1, 2)
    own, target = (maps.weights.float().clamp(min=_TINY) for maps in (student, teacher))
    apart = (student.locations.float() - teacher.locations.float()) * sizes
    each = target * ((target / own).log() + apart.abs().sum(-1))
    rows = each.sum((-2, -1)).mean(2)
    return (rows * weights).sum() / (len(rows) if config.layers == "mean" else 1)


def energy_loss(
    student: SampledMaps, teacher: SampledMaps, weights: Tensor, config: CrossAttentionConfig
) -> Tensor:
    """Energy distance of what is sampled: weighted sum over images and pairs, mean over heads.

    Points of all levels lie on one plane, measured in longer sides of the image: numbers of
    levels and of points may differ.

    Args:
        student: of the pairs, [L, B, H, P, V, R, 2].
        teacher: the same of the teacher, with H' heads, V' levels, R' points.
        weights: [L, B, P] weight of each pair, already divided by its normaliser.
        config: whether each head is compared (needs H = H') or the points of all, and whether
            layers are averaged or added.

    Returns:
        Scalar.
    """
    height, width = student.levels[0]
    parts = []
    for maps in (student, teacher):
        x, y = maps.locations.float().flatten(4, 5).unbind(-1)
        longer = max(height, width)
        points = torch.stack([x * (width / longer), y * (height / longer)], -1)
        shares = maps.weights.float().flatten(4)
        if config.heads == "mean":  # the points of all heads are one set
            points = points.transpose(2, 3).flatten(3, 4)[:, :, None]
            shares = shares.transpose(2, 3).flatten(3)[:, :, None] / maps.weights.shape[2]
        parts += [points, shares]
    rows = energy_distance(*parts).mean(2)
    return (rows * weights).sum() / (len(rows) if config.layers == "mean" else 1)
