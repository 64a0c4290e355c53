"""Query groups side by side: joined for one decoder pass, taken apart behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from d3etr.structures import DecoderOutputs, Memory


@dataclass
class AttentionScores:
    """Attention scores of every decoder layer so far.

    Attributes:
        within: per layer and group [B or 1, H, n, n].
        across: per layer [B, H, N, S].
    """

    within: list[list[Tensor]] = field(default_factory=list)
    across: list[Tensor] = field(default_factory=list)

    def stacked_across(self, sizes: list[int]) -> list[Tensor]:
        """Per group [L, B, H, n, S], each in one piece of memory."""
        layers = [torch.split(layer, sizes, 2) for layer in self.across]
        return [torch.stack(parts) for parts in zip(*layers, strict=True)]

    def stacked_within(self, images: int) -> list[Tensor]:
        """Per group [L, B, H, n, n]."""
        return [
            torch.stack([layer.expand(images, -1, -1, -1) for layer in layers])
            for layers in zip(*self.within, strict=True)
        ]


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate [N, X] or [B, N, X] along N to [B or 1, N, X]."""
    parts = [part if part.dim() == 3 else part[None] for part in parts]
    images = max(len(part) for part in parts)
    return torch.cat([part.expand(images, -1, -1) for part in parts], 1)


def zero_states(embedding: Tensor, images: int, apart: bool) -> Tensor:
    """Where decoder states start.

    Args:
        embedding: [B or 1, N, D].
        images: B.
        apart: give every image its own; else those of [1, N, D] stay shared until they meet
            their image's memory.
    """
    states = torch.zeros_like(embedding)
    return states.expand(images, -1, -1) if apart else states


def split_groups(
    memory: Memory,
    sizes: list[int],
    logits: Tensor,
    boxes: Tensor,
    states: Tensor,
    scores: AttentionScores | None,
    exclusive: bool = False,
) -> list[DecoderOutputs]:
    """Cut the outputs of all groups into one entry per group.

    Args:
        memory: what was decoded.
        sizes: queries of each group, N in total.
        logits: [L, B, N, C].
        boxes: [L, B, N, 4] cxcywh in [0, 1].
        states: [B, N, D] of the last layer.
        scores: of all layers, or None.
        exclusive: an object has one class.
    """
    groups = [
        DecoderOutputs(*parts[:2], None, None, memory.levels, memory.padding, parts[2], exclusive)
        for parts in zip(
            torch.split(logits, sizes, 2),
            torch.split(boxes, sizes, 2),
            torch.split(states, sizes, 1),
            strict=True,
        )
    ]
    if scores is None:
        return groups
    within = scores.stacked_within(len(memory.tokens))
    across = scores.stacked_across(sizes)
    return [
        replace(group, self_attention_scores=own, cross_attention_scores=other)
        for group, own, other in zip(groups, within, across, strict=True)
    ]
