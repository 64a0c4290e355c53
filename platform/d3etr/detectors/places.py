"""A detector's own tokens at the places of another detector's queries, and scores of its tokens.

Shapes: B images · N queries · V feature levels · S memory tokens of all levels · D width · C
classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d3etr.detectors.deformable_attention import bilinear_samples
from d3etr.detectors.feature_levels import on_levels, valid_ratios
from d3etr.structures import Grids, Memory, ObjectQueries, TokenScores


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


def scores_on_grid(scores: TokenScores, theirs: Grids, own: Grids) -> Tensor:
    """[B, S, C] logits of another detector's S' tokens on our grid, float32.

    A cell has what the other's tokens say whose centres lie in it, on the level of the nearest
    stride, of each class the largest: of the same strides and grids, the same token. Minus infinity
    where there is none, or none that proposes something.

    Args:
        scores: of the other detector.
        theirs: the levels that its tokens are on.
        own: ours.
    """
    logits = scores.logits.float().masked_fill(scores.silent[..., None], float("-inf"))
    if theirs == own:
        return logits
    targets = [_nearest(own.strides, stride) for stride in theirs.strides]
    place = torch.arange(logits.shape[1], device=logits.device)[None]
    index = _cells(place, theirs, own, targets)[..., None].expand_as(logits)
    tokens = sum(height * width for height, width in own.levels)
    empty = logits.new_full((len(logits), tokens, logits.shape[2]), float("-inf"))
    return empty.scatter_reduce(1, index, logits, "amax")


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
        grid = (2 * self.centres[:, :, level] - 1)[:, :, None]
        return bilinear_samples(plane, grid, "border").squeeze(3).transpose(1, 2)


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
