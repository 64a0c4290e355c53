"""Decoder layers whose queries sample a few places around references, and the loop over them.

Shapes: B images · N queries of all groups side by side · V feature levels · C classes · D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.attention import SelfAttention
from d3etr.detectors.deformable_attention import DeformableAttention
from d3etr.detectors.feature_levels import on_levels, valid_ratios
from d3etr.detectors.groups import Decoded, GroupSize, LayerAttention
from d3etr.detectors.heads import EPSILON, box_logits, moved
from d3etr.detectors.transformer import MLP, DecoderLayer, run_decoder
from d3etr.structures import Memory

Refinement = Literal["detached", "twice"] | None
"""What a layer's boxes move from. None: the group's references, in every layer. detached: the boxes
of the layer before, which learn nothing from that. twice: likewise, but what a layer predicts also
teaches the move of the layer before, and of no earlier one (look forward twice; DINO, arXiv
2203.03605, section 3.5)."""


class DeformableDecoderLayer(DecoderLayer):
    """Its queries look at a few places around references [B, N, V, 2 or 4] on padded levels."""

    def look(
        self,
        hidden: Tensor,
        embedding: Tensor,
        place: Tensor | None,
        memory: Memory,
        keep: bool,
    ) -> tuple[Tensor, LayerAttention | None]:
        """As of ``DecoderLayer``; maps are those of what was sampled."""
        mixed, samples = self.cross_attention(
            hidden,
            embedding,
            reference=place,
            padding=memory.padding,
            levels=memory.levels,
            tokens=memory.tokens,
        )
        return mixed, samples.as_maps(memory.padding, memory.levels) if keep else None


def deformable_layers(
    config: DetectorConfig, attention: Callable[[], DeformableAttention]
) -> nn.ModuleList:
    """A detector's decoder layers.

    Args:
        config: uses decoder_layers and what layers and their self-attention use.
        attention: makes a layer's attention to the memory.
    """
    return nn.ModuleList(
        DeformableDecoderLayer(config, SelfAttention(config), attention())
        for _ in range(config.decoder_layers)
    )


class DecoderWithHeads(Protocol):
    """Layers, and heads of each or one pair for all."""

    layers: nn.ModuleList
    class_heads: nn.ModuleList
    box_heads: nn.ModuleList


@dataclass(frozen=True)
class References:
    """Where queries start and how they move.

    Attributes:
        start: [B or 1, N, 2 or 4] reference logits.
        embed: query embeddings [B or 1, N, D] of the reference logits before a layer [B, N, ..].
        refinement: what a layer's boxes move from.
        epsilon: as of ``heads.movable``.
    """

    start: Tensor
    embed: Callable[[Tensor], Tensor]
    refinement: Refinement
    epsilon: float = EPSILON


def decode_around(
    decoder: DecoderWithHeads,
    hidden: Tensor,
    references: References,
    memory: Memory,
    sizes: list[GroupSize],
    attention: bool,
    norm: nn.Module | None = None,
) -> Decoded:
    """Decode all groups side by side around their references.

    Args:
        decoder: layers and heads.
        hidden: [B or 1, N, D] states before the first layer.
        references: of the queries.
        memory: encoder output.
        sizes: of each group, N queries in total.
        attention: keep what attention maps are computed from.
        norm: what every layer's predictions are read through; where queries move to is read from
            the states as they are (DINO).
    """
    images = memory.tokens.shape[0]
    start = references.start.expand(images, -1, -1)
    ratios = valid_ratios(memory.padding, memory.levels)
    logits: list[Tensor] = []
    boxes: list[Tensor] = []
    steps: list[Tensor] = []  # where each layer moved queries, from where they were, detached

    def before() -> Tensor:
        # Each layer learns its own move, not to make up for later ones.
        return steps[-1].detach() if references.refinement and steps else start

    def predict(layer: int, states: Tensor) -> Tensor:
        head = layer if len(decoder.box_heads) > 1 else 0
        box_head = decoder.box_heads[head]
        assert isinstance(box_head, MLP)
        shown: Tensor = states if norm is None else norm(states)
        logits.append(decoder.class_heads[head](shown).float())
        offsets, here = box_logits(box_head, shown), before()
        there = steps[-1] if references.refinement == "twice" and steps else here
        boxes.append(moved(offsets, there, references.epsilon).sigmoid())
        if references.refinement and layer + 1 < len(decoder.layers):
            offsets = offsets if norm is None else box_logits(box_head, states)
            steps.append(moved(offsets, here, references.epsilon))
        return shown

    def aim(index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if index:
            predict(index - 1, hidden)
        reference = before()
        place = on_levels(reference.sigmoid(), ratios, len(memory.levels))
        return references.embed(reference), place

    hidden = hidden.expand(images, -1, -1)
    states, trace = run_decoder(decoder.layers, hidden, aim, memory, sizes, attention)
    last = predict(len(states) - 1, states[-1])
    return Decoded(torch.stack(logits), torch.stack(boxes), last, trace)
