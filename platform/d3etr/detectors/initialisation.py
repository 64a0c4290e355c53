"""Initial weights of encoder, decoder and heads, as the official code draws them."""

from __future__ import annotations

import math

from torch import nn

from d3etr.detectors.attention import (
    ConditionalCrossAttention,
    DecoderSelfAttention,
    EncoderSelfAttention,
)
from d3etr.detectors.layers import MLP

PRIOR_PROBABILITY = 0.01
"""Class probability of every query before training (focal loss, arXiv 1708.02002)."""


def initialise_transformer(module: nn.Module) -> None:
    """Draw every linear layer's weights from Xavier's uniform distribution.

    Args:
        module: changed in place. Fused projections are drawn as if they were apart.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
    for part in module.modules():
        if isinstance(part, DecoderSelfAttention):
            _draw_apart(part.content)
            _draw_apart(part.position)
        elif isinstance(part, ConditionalCrossAttention):
            _draw_apart(part.key_value)
        elif isinstance(part, EncoderSelfAttention):
            _as_multihead_attention(part)


def initialise_heads(class_head: nn.Linear, box_head: MLP, box_size_bias: float) -> None:
    """Start classes at their prior probability and boxes at the reference points.

    Args:
        class_head: changed in place.
        box_head: changed in place.
        box_size_bias: logit of width and height of every first box.
    """
    prior = math.log(PRIOR_PROBABILITY / (1 - PRIOR_PROBABILITY))
    nn.init.constant_(class_head.bias, prior)
    last = box_head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    nn.init.constant_(last.bias[2:], box_size_bias)


def _draw_apart(linear: nn.Linear, gain: float = 1.0) -> None:
    for block in linear.weight.data.chunk(linear.out_features // linear.in_features):
        nn.init.xavier_uniform_(block, gain)


def _as_multihead_attention(attention: EncoderSelfAttention) -> None:
    """As ``nn.MultiheadAttention`` in DETR: bounds of the [3 D, D] block, zero biases."""
    for linear in (attention.query_key, attention.value):
        _draw_apart(linear, gain=2**-0.5)
        nn.init.zeros_(linear.bias)
    nn.init.zeros_(attention.output.bias)
