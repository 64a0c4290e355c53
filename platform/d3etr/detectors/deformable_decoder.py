"""Deformable DETR's decoder, over any number of query groups in one pass.

Shapes: B images · L layers · N queries of all groups · V feature levels · D width · C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d3etr.detectors.deformable_attention import DeformableAttention, splatted_scores
from d3etr.detectors.feature_levels import on_levels, valid_ratios
from d3etr.detectors.groups import AttentionTrace
from d3etr.detectors.heads import box_logits
from d3etr.detectors.layers import MLP, FeedForward
from d3etr.detectors.query_attention import QuerySelfAttention
from d3etr.structures import Memory

if TYPE_CHECKING:
    from d3etr.detectors.deformable_detr import DeformableDETRConfig


@dataclass(frozen=True)
class Decoded:
    """What the decoder hands to the detector.

    Attributes:
        logits: [L, B, N, C].
        boxes: [L, B, N, 4] cxcywh in [0, 1].
        states: [B, N, D] of the last layer.
        trace: attention of all layers, or None.
    """

    logits: Tensor
    boxes: Tensor
    states: Tensor
    trace: AttentionTrace | None


class DeformableDecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention, feed-forward, all post-norm.

    Args:
        config: uses width, heads, levels, points, feedforward and dropout.
    """

    def __init__(self, config: DeformableDETRConfig) -> None:
        super().__init__()
        self.self_attention = QuerySelfAttention(config.width, config.heads, config.dropout)
        self.self_norm = nn.LayerNorm(config.width)
        self.cross_attention = DeformableAttention(
            config.width, config.heads, config.levels, config.points
        )
        self.cross_norm = nn.LayerNorm(config.width)
        self.feedforward = FeedForward(config.width, config.feedforward, config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        embedding: Tensor,
        reference: Tensor,
        memory: Memory,
        sizes: list[int],
        trace: AttentionTrace | None,
    ) -> Tensor:
        """One layer for all groups.

        Args:
            hidden: [B, N, D].
            embedding: [B or 1, N, D].
            reference: [B, N, V, 2] or [B, N, V, 4], relative to the padded levels.
            memory: encoder output.
            sizes: queries of each group.
            trace: this layer's attention is appended to it; None computes no maps.

        Returns:
            [B, N, D].
        """
        mixed, within = self.self_attention(hidden, embedding, sizes, trace is not None)
        hidden = self.self_norm(hidden + self.dropout(mixed))
        mixed, samples = self.cross_attention(
            hidden + embedding, reference, memory.tokens, memory.padding, memory.levels
        )
        if trace is not None:
            trace.within.append(within)
            trace.across.append(splatted_scores(samples, memory.padding, memory.levels))
        return self.feedforward(self.cross_norm(hidden + self.dropout(mixed)))  # type: ignore[no-any-return]


class DeformableDecoder(nn.Module):
    """The stack of layers with their heads.

    With box refinement every layer has heads of its own and starts from the boxes of the one
    before; without, all share one pair of heads and one reference.

    Args:
        config: uses decoder_layers, box_refinement and what its layers use.
        classes: C.
    """

    def __init__(self, config: DeformableDETRConfig, classes: int) -> None:
        super().__init__()
        width, depth = config.width, config.decoder_layers
        self.refines = config.box_refinement
        self.layers = nn.ModuleList(DeformableDecoderLayer(config) for _ in range(depth))
        heads = depth if self.refines else 1
        self.class_heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(MLP((width, width, width, 4)) for _ in range(heads))

    def forward(
        self,
        hidden: Tensor,
        embedding: Tensor,
        reference: Tensor,
        memory: Memory,
        sizes: list[int],
        attention: bool,
    ) -> Decoded:
        """Decode all groups side by side.

        Args:
            hidden: [B, N, D] initial states.
            embedding: [B or 1, N, D].
            reference: [B, N, 2] or [B, N, 4] logits, relative to the image.
            memory: encoder output.
            sizes: queries of each group, N in total.
            attention: keep what attention maps are computed from.
        """
        trace = AttentionTrace() if attention else None
        ratios = valid_ratios(memory.padding, memory.levels)
        logits, boxes = [], []
        for index, layer in enumerate(self.layers):
            locations = on_levels(reference.sigmoid(), ratios, len(memory.levels))
            hidden = layer(hidden, embedding, locations, memory, sizes, trace)
            head = index if self.refines else 0
            logits.append(self.class_heads[head](hidden).float())
            box_head = self.box_heads[head]
            assert isinstance(box_head, MLP)
            refined = box_logits(box_head, hidden, reference)
            boxes.append(refined.sigmoid())
            if self.refines:
                # Each layer learns its own move, not to make up for later ones.
                reference = refined.detach()
        return Decoded(torch.stack(logits), torch.stack(boxes), hidden, trace)
