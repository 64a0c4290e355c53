"""KL of the splatted maps of two deformable attentions, without the maps.

A query samples a few dozen cells of thousands, and every other cell has the same small value. So
the divergence and its gradient are sums over what either side samples, and one number for the rest.

A sum over sampled cells is taken over samples, each with its share of its cell's mass, so that a
cell which several samples reach counts once.

Shapes: R rows (layers, images, heads, pairs) · V feature levels · P points on each · E = 4 V P, the
cells around the points of a row · K cells of all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d3etr.attention_maps import SPREAD, SampledMaps, hidden_by_either
from d3etr.structures import Levels, constant

_TINY = torch.finfo(torch.float32).tiny
_CELLS = 2**20
"""Cells of the planes that are held at once."""


@dataclass(frozen=True)
class _Grid:
    """Levels in a row, and which of their cells hold something.

    Attributes:
        sizes: [V, 1, 2] (width, height).
        starts: [V, 1] number of each level's first cell.
        cells: K.
        visible: [B, K] 1, or 0 where a cell holds nothing; None: each holds something.
    """

    sizes: Tensor
    starts: Tensor
    cells: int
    visible: Tensor | None

    @classmethod
    def of(cls, levels: Levels, hidden: Tensor | None, device: torch.device) -> _Grid:
        sides = tuple(float(side) for height, width in levels for side in (width, height))
        starts = [0.0]
        for height, width in levels:
            starts.append(starts[-1] + height * width)
        return cls(
            constant(sides, torch.float32, device).view(-1, 1, 2),
            constant(tuple(starts[:-1]), torch.float32, device).view(-1, 1),
            int(starts[-1]),
            None if hidden is None else (~hidden).float(),
        )

    def counted(self, image: Tensor) -> Tensor | float:
        """Cells that hold something: of all images, or [R, 1]."""
        return float(self.cells) if self.visible is None else self.visible.sum(-1)[image][:, None]


@dataclass(frozen=True)
class _Spread:
    """Points spread over the four cells around each.

    Attributes:
        index: [R, E] cell.
        mass: [R, E] weight of the point times the cell's share; 0 where nothing is.
        shares: [R, V, P, 2, 2] shares of the lower and the higher cell (last but one) by axis; 0 of
            cells outside.
        inside: likewise, 1 or 0.
        visible: [R, E] 1, or 0 where a cell holds nothing; None: each holds something.
    """

    index: Tensor
    mass: Tensor
    shares: Tensor
    inside: Tensor
    visible: Tensor | None

    @classmethod
    def of(cls, locations: Tensor, weights: Tensor, grid: _Grid, image: Tensor) -> _Spread:
        """Of points [R, V, P, 2] and weights [R, V, P]; ``image`` [R] is the row's."""
        place = locations * grid.sizes - 0.5  # in cells
        first = place.floor()
        share = place - first
        cells, last = torch.stack([first, first + 1], -2), grid.sizes[:, :, None] - 1
        nearest = torch.minimum(cells.clamp(min=0), last)
        inside = (nearest == cells).float()
        shares = torch.stack([1 - share, share], -2) * inside
        rows = nearest[..., 1] * grid.sizes[..., :1] + grid.starts[..., None]
        index = (rows[..., None] + nearest[..., None, :, 0]).long().flatten(1)
        down = weights[..., None] * shares[..., 1]
        mass = (down[..., None] * shares[..., None, :, 0]).flatten(1)
        if grid.visible is None:
            return cls(index, mass, shares, inside, None)
        visible = grid.visible.take(index + grid.cells * image[:, None])
        return cls(index, mass * visible, shares, inside, visible)

    def plane(self, cells: int) -> Tensor:
        """[R, K] mass of each cell."""
        return self.mass.new_zeros(len(self.mass), cells).scatter_add_(1, self.index, self.mass)

    def gradients(self, weights: Tensor, grid: _Grid, by_mass: Tensor) -> tuple[Tensor, Tensor]:
        """By locations and by weights, from that by each cell's mass, [R, E]."""
        if self.visible is not None:
            by_mass = by_mass * self.visible
        by_mass = by_mass.view(*weights.shape, 2, 2)
        across, down = self.shares.unbind(-1)
        by_down = (by_mass * across[..., None, :]).sum(-1)
        by_across = (by_mass * down[..., None]).sum(-2)
        slopes = torch.stack([by_across, by_down], -1) * self.inside
        by_place = (slopes[..., 1, :] - slopes[..., 0, :]) * weights[..., None]
        return by_place * grid.sizes, (by_down * down).sum(-1)


class _SplattedDivergence(torch.autograd.Function):
    """KL of each row; only the student's points have a gradient, which is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        locations: Tensor,
        weights: Tensor,
        others: Tensor,
        shares: Tensor,
        image: Tensor,
        grid: _Grid,
    ) -> Tensor:
        rows = max(1, _CELLS // grid.cells)
        given = locations, weights, others, shares, image
        pieces = zip(*(torch.split(part, rows) for part in given), strict=True)
        found = [_some_rows(piece, grid) for piece in pieces]
        divergence, by_locations, by_weights = (
            torch.cat(part) for part in zip(*found, strict=True)
        )
        ctx.save_for_backward(by_locations, by_weights)
        return divergence

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        by_locations, by_weights = ctx.saved_tensors
        by_locations = gradient[:, None, None, None] * by_locations
        return by_locations, gradient[:, None, None] * by_weights, None, None, None, None


def _some_rows(given: Sequence[Tensor], grid: _Grid) -> tuple[Tensor, Tensor, Tensor]:
    """KL [R] with its gradients by the student's locations and weights.

    Args:
        given: of R rows locations and weights of the student, both of the teacher, and the image.
        grid: what they are spread over.
    """
    locations, weights, others, shares, image = given
    own = _Spread.of(locations, weights, grid, image)
    theirs = _Spread.of(others, shares, grid, image)
    count = grid.counted(image)
    mass, their_mass = (1 - SPREAD) * own.mass, (1 - SPREAD) * theirs.mass
    # What each cell has at least: its part of what is spread evenly or left the grid.
    floor, their_floor = ((1 - x.sum(1, keepdim=True)) / count for x in (mass, their_mass))
    plane, their_plane = own.plane(grid.cells), theirs.plane(grid.cells)
    sampled, taught = plane.gather(1, own.index), their_plane.gather(1, theirs.index)
    s, t = (1 - SPREAD) * sampled + floor, (1 - SPREAD) * taught + their_floor
    t_here = (1 - SPREAD) * their_plane.gather(1, own.index) + their_floor
    s_there = (1 - SPREAD) * plane.gather(1, theirs.index) + floor
    part, part_there = (
        x.mass / cell.clamp(min=_TINY) for x, cell in ((own, sampled), (theirs, taught))
    )
    # All cells as if nobody sampled them; what the teacher's samples change; what the student's.
    lowest, their_lowest = floor.log(), their_floor.log()
    divergence = count * their_floor * (their_lowest - lowest)
    entropy = part_there * (t * t.log() - their_floor * their_lowest)
    divergence = divergence + (entropy - their_mass * s_there.log()).sum(1, keepdim=True)
    divergence = divergence + their_floor * (part * (lowest - s.log())).sum(1, keepdim=True)
    ratios = count * their_floor / floor + (their_mass / s_there).sum(1, keepdim=True)
    ratios = ratios + their_floor * (part * (1 / s - 1 / floor)).sum(1, keepdim=True)
    by_mass = (1 - SPREAD) * (ratios / count - t_here / s)
    return divergence[:, 0], *own.gradients(weights, grid, by_mass)


def splatted_divergence(student: SampledMaps, teacher: SampledMaps) -> Tensor:
    """KL(teacher's map || student's map) of each row, as of their ``scores``.

    Cells that either hides are in neither map.

    Args:
        student: [L, B, H, P, V, R, 2], which has a gradient.
        teacher: the same on the same levels; numbers of points may differ.

    Returns:
        [L, B, H, P].
    """
    shape = student.weights.shape[:4]
    device = student.weights.device
    parts = [
        part.float().flatten(0, 3)
        for maps in (student, teacher)
        for part in (maps.locations, maps.weights)
    ]
    image = torch.arange(shape[1], device=device).view(1, -1, 1, 1).expand(shape).flatten()
    hidden = hidden_by_either(student.padding, teacher.padding)
    grid = _Grid.of(student.levels, hidden, device)
    found: Tensor = _SplattedDivergence.apply(*parts, image, grid)
    return found.view(shape)
