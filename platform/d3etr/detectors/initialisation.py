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
from d3etr.detectors.query_attention import MemoryAttention, QuerySelfAttention

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
        elif isinstance(part, EncoderSelfAttention | QuerySelfAttention):
            _as_multihead_attention(part)
        elif isinstance(part, MemoryAttention):
            for linear in (part.query, part.key, part.value):
                _draw_apart(linear, gain=2**-0.5)
                nn.init.zeros_(linear.bias)
            nn.init.zeros_(part.output.bias)


def initialise_class_head(class_head: nn.Linear) -> None:
    """Start classes at their prior probability.

    Args:
        class_head: changed in place.
    """
    prior = math.log(PRIOR_PROBABILITY / (1 - PRIOR_PROBABILITY))
    nn.init.constant_(class_head.bias, prior)


def initialise_box_head(box_head: MLP, box_size_bias: float) -> None:
    """Start boxes at their reference, whatever the states.

    Args:
        box_head: changed in place.
        box_size_bias: logit of width and height of every first box.
    """
    last = _last_layer(box_head)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    initialise_sizes(box_head, box_size_bias)


def initialise_sizes(box_head: MLP, box_size_bias: float) -> None:
    """Set the biases of width and height logits.

    Args:
        box_head: changed in place.
        box_size_bias: logit of width and height.
    """
    nn.init.constant_(_last_layer(box_head).bias[2:], box_size_bias)


def _last_layer(head: MLP) -> nn.Linear:
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    return last


def _draw_apart(linear: nn.Linear, gain: float = 1.0) -> None:
    for block in linear.weight.data.chunk(linear.out_features // linear.in_features):
        nn.init.xavier_uniform_(block, gain)


def _as_multihead_attention(attention: EncoderSelfAttention | QuerySelfAttention) -> None:
    """As ``nn.MultiheadAttention`` in DETR: bounds of the [3 D, D] block, zero biases."""
    for linear in (attention.query_key, attention.value):
        _draw_apart(linear, gain=2**-0.5)
        nn.init.zeros_(linear.bias)
    nn.init.zeros_(attention.output.bias)
