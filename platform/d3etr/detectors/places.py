"""A detector's own tokens at the places of another detector's queries.

Shapes: B images · N queries · V feature levels · S memory tokens of all levels · D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from d3etr.detectors.feature_levels import on_levels, valid_ratios
from d3etr.structures import Grids, Memory, ObjectQueries


def tokens_at_places(memory: Memory, own: Grids, group: ObjectQueries, reference: Tensor) -> Tensor:
    """[B, N, D] tokens of ``memory`` where a group's queries were made.

    A query that was made of a token has the nearest cell of the level of the same stride. Where
    there is no such level, it has what the level of the nearest stride holds at the centre of its
    reference, bilinear; and a query that was made of no token the mean of that over all levels.

    Args:
        memory: encoder output of B images.
        own: the levels that its tokens are on.
        group: N queries, with the place of each where it has one.
        reference: [B, N, 2 or 4] their references, logits.
    """
    centres = on_levels(
        reference[..., :2].sigmoid(), valid_ratios(memory.padding, memory.levels), len(own.levels)
    )
    planes = _Planes(memory, centres)
    if group.place is None or group.grids is None:
        return torch.stack([planes.sample(level) for level in range(len(own.levels))]).mean(0)
    place, theirs = group.place, group.grids
    targets = [_nearest(own.strides, stride) for stride in theirs.strides]
    index = _cells(place, theirs, own, targets)
    tokens = memory.tokens
    found = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
    begin = 0
    for (height, width), stride, target in zip(*theirs, targets, strict=True):
        if own.strides[target] != stride:
            of_level = (place >= begin) & (place < begin + height * width)
            found = torch.where(of_level[..., None], planes.sample(target), found)
        begin += height * width
    return found


@dataclass
class _Planes:
    """The memory's levels, sampled at centres [B, N, V, 2] in [0, 1]."""

    memory: Memory
    centres: Tensor

    def sample(self, level: int) -> Tensor:
        """[B, N, D] of one level, bilinear; outside is as at the border."""
        sizes = [height * width for height, width in self.memory.levels]
        part = torch.split(self.memory.tokens, sizes, 1)[level]
        plane = part.transpose(1, 2).unflatten(2, self.memory.levels[level])  # type: ignore[no-untyped-call]
        grid = (2 * self.centres[:, :, level] - 1)[:, :, None].to(plane.dtype)
        sampled = functional.grid_sample(plane, grid, padding_mode="border", align_corners=False)
        return sampled.squeeze(3).transpose(1, 2)


def _nearest(strides: tuple[int, ...], stride: int) -> int:
    """The level whose stride is nearest by ratio; of two, the finer one."""
    ratios = [max(own / stride, stride / own) for own in strides]
    return ratios.index(min(ratios))


def _cells(place: Tensor, theirs: Grids, own: Grids, targets: list[int]) -> Tensor:
    """[B, N] our token of the cell that the centre of each of their tokens lies in.

    Args:
        place: [B, N] their tokens.
        theirs: the levels that ``place`` runs over.
        own: ours.
        targets: our level for each of theirs.
    """
    index = torch.zeros_like(place)
    starts = [sum(h * w for h, w in own.levels[:level]) for level in range(len(own.levels))]
    begin = 0
    for (height, width), target in zip(theirs.levels, targets, strict=True):
        rows, columns = own.levels[target]
        cell = place - begin
        row = ((cell // width) * 2 + 1) * rows // (2 * height)
        column = ((cell % width) * 2 + 1) * columns // (2 * width)
        of_level = (cell >= 0) & (cell < height * width)
        index = torch.where(of_level, starts[target] + row * columns + column, index)
        begin += height * width
    return index
