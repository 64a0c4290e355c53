"""Encoder and decoder layers, post-norm as in DETR, and the loops over them.

Shapes: B images · L layers · N queries of all groups side by side · S memory tokens · D width.
A leading 1 instead of B means that all images share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.attention import SelfAttention
from d3etr.detectors.groups import AttentionTrace, GroupSize, LayerAttention
from d3etr.structures import Memory

Activation = Callable[[], nn.Module]
"""Makes the activation of one layer."""


def relu() -> nn.Module:
    """What most layers have."""
    return nn.ReLU(inplace=True)


class MLP(nn.Module):
    """Linear layers with an activation between them.

    Args:
        widths: channels from input to output; one linear layer between neighbours.
        activation: between them.
    """

    def __init__(self, widths: Sequence[int], activation: Activation = relu) -> None:
        super().__init__()
        self.activation = activation()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., widths[0]] to [..., widths[-1]]."""
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x)  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Post-norm residual block of two linear layers.

    Args:
        config: uses width D, feedforward and dropout (after the activation and before the sum).
        activation: between them.
    """

    def __init__(self, config: DetectorConfig, activation: Activation = relu) -> None:
        super().__init__()
        self.inner = nn.Linear(config.width, config.feedforward)
        self.outer = nn.Linear(config.feedforward, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        hidden = self.dropout(self.activation(self.inner(x)))
        return self.norm(x + self.dropout(self.outer(hidden)))  # type: ignore[no-any-return]


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward, each with residual and layer norm.

    Args:
        config: uses width, feedforward and dropout.
        attention: of tokens among each other.
        activation: of the feed-forward block.
    """

    def __init__(
        self, config: DetectorConfig, attention: nn.Module, activation: Activation = relu
    ) -> None:
        super().__init__()
        self.attention = attention
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.feedforward = FeedForward(config, activation)

    def forward(self, tokens: Tensor, position: Tensor, **where: Any) -> Tensor:
        """Map [B, S, D] tokens to [B, S, D]; ``where`` is what else the attention takes."""
        mixed, _ = self.attention(tokens, position, **where)
        return self.feedforward(self.norm(tokens + self.dropout(mixed)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A stack of encoder layers; with none, tokens pass unchanged.

    Args:
        config: uses encoder_layers and what its layers use.
        attention: makes each layer's.
        scaled: positions are scaled by what tokens hold, and ReLU has a learned slope (DAB-DETR).
    """

    def __init__(
        self,
        config: DetectorConfig,
        attention: Callable[[], nn.Module] | None = None,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        activation = nn.PReLU if scaled else relu
        self.layers = nn.ModuleList(
            EncoderLayer(config, attention() if attention else SelfAttention(config), activation)
            for _ in range(config.encoder_layers)
        )
        self.position_scale: MLP | None = None
        if scaled:
            self.position_scale = MLP((config.width, config.width, config.width))
            self.position_scale.requires_grad_(config.encoder_layers > 0)  # else nobody trains it

    def forward(self, tokens: Tensor, position: Tensor, **where: Any) -> Tensor:
        """Encode memory tokens.

        Args:
            tokens: [B, S, D].
            position: [B or 1, S, D].
            where: ``padding`` [B, S] bool, True under padding, or None, and what else the
                attention takes.

        Returns:
            [B, S, D].
        """
        for layer in self.layers:
            scale = self.position_scale
            tokens = layer(tokens, position * scale(tokens) if scale else position, **where)
        return tokens


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward, all post-norm.

    Args:
        config: uses width, feedforward and dropout.
        self_attention: among the queries of each group, groups (and blocks) apart.
        cross_attention: of queries to the memory.
        activation: of the feed-forward block.
    """

    def __init__(
        self,
        config: DetectorConfig,
        self_attention: nn.Module,
        cross_attention: nn.Module,
        activation: Activation = relu,
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.self_norm: nn.Module = nn.LayerNorm(config.width)
        self.cross_attention = cross_attention
        self.cross_norm: nn.Module = nn.LayerNorm(config.width)
        self.feedforward: nn.Module = FeedForward(config, activation)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        embedding: Tensor,
        place: Tensor | None,
        memory: Memory,
        sizes: list[GroupSize],
        trace: AttentionTrace | None,
    ) -> Tensor:
        """One layer for all groups.

        Args:
            hidden: [B or 1, N, D].
            embedding: [B or 1, N, D].
            place: where queries look, as the cross-attention takes it.
            memory: encoder output.
            sizes: of each group.
            trace: this layer's attention is appended to it, if there is one.

        Returns:
            [B, N, D].
        """
        keep = trace is not None
        mixed, within = self.self_attention(hidden, embedding, sizes=sizes, keep=keep)
        hidden = self.self_norm(hidden + self.dropout(mixed))
        mixed, across = self.look(hidden, embedding, place, memory, keep)
        hidden = self.join(hidden, self.dropout(mixed))
        if trace is not None and across is not None:
            trace.within.append(within)
            trace.across.append(across)
        return self.feedforward(hidden)  # type: ignore[no-any-return]

    def join(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """States [B, N, D] with what they have read [B, N, D]."""
        return self.cross_norm(hidden + mixed)  # type: ignore[no-any-return]

    def look(
        self,
        hidden: Tensor,
        embedding: Tensor,
        place: Tensor | None,
        memory: Memory,
        keep: bool,
    ) -> tuple[Tensor, LayerAttention | None]:
        """What queries read from the memory [B, N, D], and what maps are compared by or None."""
        return self.cross_attention(hidden, embedding, place, memory, keep)  # type: ignore[no-any-return]


Aim = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]
"""From a layer's number and the states before it: query embedding, and where queries look."""


def run_decoder(
    layers: Iterable[nn.Module],
    hidden: Tensor,
    aim: Aim,
    memory: Memory,
    sizes: list[GroupSize],
    attention: bool,
) -> tuple[list[Tensor], AttentionTrace | None]:
    """Decode all groups side by side in one pass.

    Args:
        layers: as ``DecoderLayer``.
        hidden: [B or 1, N, D] states before the first layer.
        aim: called before each layer; refinement of references happens there.
        memory: encoder output.
        sizes: of each group, N queries in total.
        attention: keep what attention maps are computed from.

    Returns:
        [B, N, D] of each layer, and the attention or None.
    """
    trace = AttentionTrace() if attention else None
    states = []
    for index, layer in enumerate(layers):
        embedding, place = aim(index, hidden)
        hidden = layer(hidden, embedding, place, memory, sizes, trace)
        states.append(hidden)
    return states, trace
