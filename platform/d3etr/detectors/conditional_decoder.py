"""Conditional DETR's decoder, over any number of query groups in one pass.

Shapes: B images · L layers · N queries of all groups · H heads · S memory tokens · D width.
A leading 1 instead of B means that all images share it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.attention import ConditionalCrossAttention, DecoderSelfAttention
from d3etr.detectors.groups import AttentionTrace, zero_states
from d3etr.detectors.layers import MLP, FeedForward
from d3etr.structures import Memory


class DecoderLayer(nn.Module):
    """Self-attention, conditional cross-attention, feed-forward, all post-norm.

    Args:
        config: uses width, heads, feedforward and dropout.
        first: whether it is the decoder's first layer.
        learned_slope: PReLU instead of ReLU.
    """

    def __init__(self, config: DetectorConfig, first: bool, learned_slope: bool = False) -> None:
        super().__init__()
        sizes = (config.width, config.heads, config.dropout)
        self.self_attention = DecoderSelfAttention(*sizes)
        self.self_norm = nn.LayerNorm(config.width)
        self.cross_attention = ConditionalCrossAttention(*sizes, first)
        self.cross_norm = nn.LayerNorm(config.width)
        self.feedforward = FeedForward(
            config.width, config.feedforward, config.dropout, learned_slope
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        embedding: Tensor,
        spatial: Tensor,
        memory: Memory,
        sizes: list[int],
        trace: AttentionTrace | None,
    ) -> Tensor:
        """One layer for all groups.

        Args:
            hidden: [B or 1, N, D].
            embedding: [B or 1, N, D].
            spatial: [B or 1, N, D], encoded reference points.
            memory: encoder output.
            sizes: queries of each group.
            trace: this layer's attention is appended to it, if there is one.

        Returns:
            [B, N, D].
        """
        attention = trace is not None
        mixed, within = self.self_attention(hidden, embedding, sizes, attention)
        hidden = self.self_norm(hidden + self.dropout(mixed))
        mixed, across = self.cross_attention(
            hidden,
            embedding,
            spatial,
            memory.tokens,
            memory.position,
            memory.padding,
            attention,
        )
        hidden = self.cross_norm(hidden + self.dropout(mixed))
        if trace is not None and across is not None:
            trace.within.append(within)
            trace.across.append(across)
        return self.feedforward(hidden)  # type: ignore[no-any-return]


class ConditionalDecoder(nn.Module):
    """The stack of layers with the transformation of reference points between them.

    Args:
        config: uses width, heads, feedforward, dropout and decoder_layers.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(config, first=index == 0) for index in range(config.decoder_layers)
        )
        self.query_scale = MLP((config.width, config.width, config.width))
        # The first layer has no use for it: workers would wait for its gradient for ever.
        self.query_scale.requires_grad_(config.decoder_layers > 1)
        self.norm = nn.LayerNorm(config.width)
        self.dropout = config.dropout

    def forward(
        self,
        embedding: Tensor,
        encoded_points: Tensor,
        memory: Memory,
        sizes: list[int],
        attention: bool,
    ) -> tuple[Tensor, AttentionTrace | None]:
        """Decode all groups side by side.

        Args:
            embedding: [B or 1, N, D].
            encoded_points: [B or 1, N, D] sine encoding of the reference points.
            memory: encoder output.
            sizes: queries of each group, N in total.
            attention: keep what attention maps are computed from.

        Returns:
            [L, B, N, D] normalised states, and the attention or None.
        """
        trace = AttentionTrace() if attention else None
        # Dropout tells images apart.
        per_image = self.training and self.dropout > 0
        hidden = zero_states(embedding, len(memory.tokens), per_image)
        states = []
        for index, layer in enumerate(self.layers):
            # lambda_q of equation 3 is 1 in the first layer: queries have no content yet.
            spatial = encoded_points * self.query_scale(hidden) if index else encoded_points
            hidden = layer(hidden, embedding, spatial, memory, sizes, trace)
            states.append(hidden)
        return self.norm(torch.stack(states)), trace
