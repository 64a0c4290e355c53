"""Query groups side by side: joined for one decoder pass, taken apart behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from d3etr.attention_maps import (
    AttentionMaps,
    CrossMaps,
    ProductMaps,
    SampledMaps,
    ScoredMaps,
)
from d3etr.edge_distributions import BoxDistributions
from d3etr.structures import DecoderOutputs, Memory, ObjectQueries

_Maps = TypeVar("_Maps")

LayerAttention = ProductMaps | SampledMaps | Tensor
"""What maps of one layer and group are compared by: their factors [B or 1, H, N, E], what was
sampled [B, H, N, V, R, 2], or scores [B or 1, H, N, K]."""


class GroupSize(NamedTuple):
    """Queries of one group side by side with others, and whom they see.

    Attributes:
        queries: how many.
        blocks: as of ``ObjectQueries``; each has queries / blocks of them.
        see_first: likewise.
        maps: whether its attention is kept where any is.
    """

    queries: int
    blocks: int = 0
    see_first: bool = True
    maps: bool = True


def sizes_of(groups: Sequence[ObjectQueries], maps_of_blocks: bool = False) -> list[GroupSize]:
    """Sizes of groups that are decoded together, in their order.

    Args:
        groups: the first one without blocks.
        maps_of_blocks: whether attention of groups with blocks is kept too.

    Raises:
        ValueError: blocks of unequal size, or blocks in the first group, which they would see.
    """
    sizes = []
    for group in groups:
        maps = group.count > 0 and (not group.blocks or (maps_of_blocks and group.see_first))
        sizes.append(GroupSize(group.count, group.blocks, group.see_first, maps))
    for number, (queries, blocks, *_) in enumerate(sizes):
        if blocks and (not number or queries % blocks):
            found = f"{queries} queries in {blocks} blocks as group {number} of {len(sizes)}"
            raise ValueError(f"{found}: blocks are equal, and see the group before them")
    return sizes


@dataclass
class AttentionTrace:
    """Attention of every decoder layer so far.

    Attributes:
        within: per layer and group whose maps are kept, among the group's queries; of a group with
            blocks among those of the same block.
        across: per layer, of all groups' queries side by side to the memory.
    """

    within: list[list[LayerAttention]] = field(default_factory=list)
    across: list[LayerAttention] = field(default_factory=list)

    def self_maps(self, images: int) -> list[AttentionMaps]:
        """Of each group whose maps are kept."""
        return [_self_maps(layers, images) for layers in zip(*self.within, strict=True)]

    def cross_maps(self, sizes: list[GroupSize], memory: Memory) -> list[CrossMaps]:
        """Of each group whose maps are kept; they share the keys."""
        scores = [layer for layer in self.across if isinstance(layer, Tensor)]
        if scores:
            return [ScoredMaps(part) for part in _split_layers(scores, sizes)]
        samples = [layer for layer in self.across if isinstance(layer, SampledMaps)]
        if samples:
            places = _split_layers([layer.locations for layer in samples], sizes)
            weights = _split_layers([layer.weights for layer in samples], sizes)
            pairs = zip(places, weights, strict=True)
            return [SampledMaps(*pair, memory.levels, memory.padding) for pair in pairs]
        products = [layer for layer in self.across if isinstance(layer, ProductMaps)]
        key = torch.stack([layer.key for layer in products])
        queries = _split_layers([layer.query for layer in products], sizes)
        return [ProductMaps(query, key, memory.padding) for query in queries]


def _self_maps(layers: Sequence[LayerAttention], images: int) -> AttentionMaps:
    """Of one group; a first layer that all images share is theirs alike."""

    def stacked(parts: list[Tensor]) -> Tensor:
        return torch.stack([part.expand(images, -1, -1, -1) for part in parts])

    scores = [layer for layer in layers if isinstance(layer, Tensor)]
    if scores:
        return ScoredMaps(stacked(scores))
    products = [layer for layer in layers if isinstance(layer, ProductMaps)]
    return ProductMaps(
        stacked([layer.query for layer in products]), stacked([layer.key for layer in products])
    )


def _split_layers(layers: list[Tensor], sizes: list[GroupSize]) -> list[Tensor]:
    """[B, H, N, X] of each layer to [L, B, H, n, X] of each group, each in one piece of memory.

    Groups whose maps are not kept are left out.
    """
    parts = [torch.split(layer, [size.queries for size in sizes], 2) for layer in layers]
    groups = zip(sizes, zip(*parts, strict=True), strict=True)
    return [torch.stack(group) for size, group in groups if size.maps]


def _or_none(maps: Sequence[_Maps], sizes: list[GroupSize]) -> list[_Maps | None]:
    """Maps of groups that have some, and None for the others."""
    found = iter(maps)
    return [next(found) if size.maps else None for size in sizes]


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate [N, X] or [B, N, X] along N to [B or 1, N, X]."""
    parts = [part if part.dim() == 3 else part[None] for part in parts]
    images = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(images, -1, -1) for part in parts], 1)


class Decoded(NamedTuple):
    """What a decoder returns for all groups side by side.

    Attributes:
        logits: [L, B, N, C].
        boxes: [L, B, N, 4] cxcywh in [0, 1].
        states: [B, N, D] of the last layer.
        trace: attention of all layers, or None.
        no_object: [L, B, N] log-probability that there is none, where classes are exclusive.
        distributions: of boxes, where the decoder refines those.
    """

    logits: Tensor
    boxes: Tensor
    states: Tensor
    trace: AttentionTrace | None
    no_object: Tensor | None = None
    distributions: BoxDistributions | None = None


def split_groups(memory: Memory, sizes: list[GroupSize], decoded: Decoded) -> list[DecoderOutputs]:
    """Cut the outputs of all groups into one entry per group.

    Args:
        memory: what was decoded.
        sizes: of each group, N queries in total.
        decoded: outputs of all.
    """
    logits, boxes, states, trace, no_object, distributions = decoded
    none: list[None] = [None] * len(sizes)
    queries = [size.queries for size in sizes]
    parts = zip(
        torch.split(logits, queries, 2),
        torch.split(boxes, queries, 2),
        none if trace is None else _or_none(trace.self_maps(memory.tokens.shape[0]), sizes),
        none if trace is None else _or_none(trace.cross_maps(sizes, memory), sizes),
        torch.split(states, queries, 1),
        none if no_object is None else torch.split(no_object, queries, 2),
        none if distributions is None else distributions.of_queries(queries),
        strict=True,
    )
    return [
        DecoderOutputs(
            scores,
            places,
            own,
            other,
            memory.levels,
            memory.padding,
            last,
            softmax_classes=no_object is not None,
            no_object=nothing,
            distributions=edges,
        )
        for scores, places, own, other, last, nothing, edges in parts
    ]
