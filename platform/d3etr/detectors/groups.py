"""Query groups side by side: joined for one decoder pass, taken apart behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from d3etr.attention_maps import (
    AttentionMaps,
    CrossMaps,
    ProductMaps,
    SampledMaps,
    ScoredMaps,
)
from d3etr.structures import DecoderOutputs, Memory

LayerAttention = ProductMaps | SampledMaps | Tensor
"""What maps of one layer and group are compared by: their factors [B or 1, H, N, E], what was
sampled [B, H, N, V, R, 2], or scores [B or 1, H, N, K]."""


@dataclass
class AttentionTrace:
    """Attention of every decoder layer so far.

    Attributes:
        within: per layer and group, among the group's queries.
        across: per layer, of all groups' queries side by side to the memory.
    """

    within: list[list[LayerAttention]] = field(default_factory=list)
    across: list[LayerAttention] = field(default_factory=list)

    def self_maps(self, images: int) -> list[AttentionMaps]:
        """Of each group."""
        return [_self_maps(layers, images) for layers in zip(*self.within, strict=True)]

    def cross_maps(self, sizes: list[int], memory: Memory) -> list[CrossMaps]:
        """Of each group; they share the keys."""
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


def _split_layers(layers: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """[B, H, N, X] of each layer to [L, B, H, n, X] of each group, each in one piece of memory."""
    parts = [torch.split(layer, sizes, 2) for layer in layers]
    return [torch.stack(group) for group in zip(*parts, strict=True)]


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate [N, X] or [B, N, X] along N to [B or 1, N, X]."""
    parts = [part if part.dim() == 3 else part[None] for part in parts]
    images = max(len(part) for part in parts)
    return torch.cat([part.expand(images, -1, -1) for part in parts], 1)


class Decoded(NamedTuple):
    """What a decoder returns for all groups side by side.

    Attributes:
        logits: [L, B, N, C].
        boxes: [L, B, N, 4] cxcywh in [0, 1].
        states: [B, N, D] of the last layer.
        trace: attention of all layers, or None.
        no_object: [L, B, N] log-probability that there is none, where classes are exclusive.
    """

    logits: Tensor
    boxes: Tensor
    states: Tensor
    trace: AttentionTrace | None
    no_object: Tensor | None = None


def split_groups(memory: Memory, sizes: list[int], decoded: Decoded) -> list[DecoderOutputs]:
    """Cut the outputs of all groups into one entry per group.

    Args:
        memory: what was decoded.
        sizes: queries of each group, N in total.
        decoded: outputs of all.
    """
    logits, boxes, states, trace, no_object = decoded
    none: list[None] = [None] * len(sizes)
    parts = zip(
        torch.split(logits, sizes, 2),
        torch.split(boxes, sizes, 2),
        none if trace is None else trace.self_maps(len(memory.tokens)),
        none if trace is None else trace.cross_maps(sizes, memory),
        torch.split(states, sizes, 1),
        none if no_object is None else torch.split(no_object, sizes, 2),
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
        )
        for scores, places, own, other, last, nothing in parts
    ]
