"""The transformer encoder over memory tokens, post-norm as in DETR."""

from __future__ import annotations

from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.attention import EncoderSelfAttention
from d3etr.detectors.layers import MLP, FeedForward


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward, each with residual and layer norm."""

    def __init__(self, config: DetectorConfig, learned_slope: bool = False) -> None:
        super().__init__()
        self.attention = EncoderSelfAttention(config.width, config.heads, config.dropout)
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.feedforward = FeedForward(
            config.width, config.feedforward, config.dropout, learned_slope
        )

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        """Map [B, S, D] tokens to [B, S, D]."""
        mixed = self.attention(tokens, position, padding)
        return self.feedforward(self.norm(tokens + self.dropout(mixed)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A stack of encoder layers; with none, tokens pass unchanged.

    Args:
        config: uses width, heads, feedforward, dropout and encoder_layers.
        learned_slope: PReLU instead of ReLU.
    """

    def __init__(self, config: DetectorConfig, learned_slope: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(config, learned_slope) for _ in range(config.encoder_layers)
        )

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        """Encode memory tokens.

        Args:
            tokens: [B, S, D].
            position: [B, S, D], or [1, S, D] shared by all images.
            padding: [B, S] bool, True under padding, or None.

        Returns:
            [B, S, D].
        """
        for layer in self.layers:
            tokens = layer(tokens, position, padding)
        return tokens


class ScaledPositionEncoder(Encoder):
    """DAB-DETR's: positions are scaled by what tokens hold, and ReLU has a learned slope.

    Args:
        config: as ``Encoder``'s.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config, learned_slope=True)
        self.position_scale = MLP((config.width, config.width, config.width))
        self.position_scale.requires_grad_(config.encoder_layers > 0)  # else nobody trains it

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        """Encode memory tokens, as ``Encoder.forward``."""
        for layer in self.layers:
            tokens = layer(tokens, position * self.position_scale(tokens), padding)
        return tokens
