"""Deformable DETR's encoder: tokens of all feature levels read each other at few places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from d3etr.detectors.deformable_attention import DeformableAttention
from d3etr.detectors.feature_levels import cell_centres, on_levels, valid_ratios
from d3etr.detectors.layers import FeedForward
from d3etr.structures import Levels

if TYPE_CHECKING:
    from d3etr.detectors.deformable_detr import DeformableDETRConfig


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention, then feed-forward, each with residual and layer norm.

    Args:
        config: uses width, heads, levels, points, feedforward and dropout.
    """

    def __init__(self, config: DeformableDETRConfig) -> None:
        super().__init__()
        self.attention = DeformableAttention(
            config.width, config.heads, config.levels, config.points
        )
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.feedforward = FeedForward(config.width, config.feedforward, config.dropout)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        reference: Tensor,
        padding: Tensor | None,
        levels: Levels,
    ) -> Tensor:
        """Map [B, S, D] tokens to [B, S, D]; ``reference`` is [B, S, V, 2]."""
        mixed, _ = self.attention(tokens + position, reference, tokens, padding, levels)
        return self.feedforward(self.norm(tokens + self.dropout(mixed)))  # type: ignore[no-any-return]


class DeformableEncoder(nn.Module):
    """A stack of deformable encoder layers.

    Args:
        config: uses encoder_layers beside what its layers use.
    """

    def __init__(self, config: DeformableDETRConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(config) for _ in range(config.encoder_layers)
        )

    def forward(
        self, tokens: Tensor, position: Tensor, padding: Tensor | None, levels: Levels
    ) -> Tensor:
        """Encode memory tokens.

        Args:
            tokens: [B, S, D].
            position: [B or 1, S, D].
            padding: [B, S] bool, True under padding, or None.
            levels: the grids that S runs over.

        Returns:
            [B, S, D].
        """
        ratios = valid_ratios(padding, levels)
        centres = cell_centres(ratios, levels, tokens).expand(len(tokens), -1, -1)
        reference = on_levels(centres, ratios, len(levels))
        for layer in self.layers:
            tokens = layer(tokens, position, reference, padding, levels)
        return tokens
