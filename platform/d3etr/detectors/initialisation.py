"""Initial weights of encoder, decoder and heads, as the official code draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from d3etr.detectors.attention import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    CrossAttention,
    MultiHeadAttention,
    SelfAttention,
)
from d3etr.detectors.transformer import MLP

PRIOR_PROBABILITY = 0.01
"""Class probability of every query before training (focal loss, arXiv 1708.02002)."""

PEAK = 6.0
"""Score of a cell at the reference point, before training; far away it is about 0."""
FALLOFF = 6.0
"""Frequencies over which the projections' weights fall by a factor of e: low ones hardly tell
places apart."""


def initialise_transformer(module: nn.Module) -> None:
    """Draw every linear layer's weights from Xavier's uniform distribution.

    Args:
        module: changed in place. Fused projections are drawn as if they were apart.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
    for part in module.modules():
        if isinstance(part, ConditionalSelfAttention):
            _draw_apart(part.content)
            _draw_apart(part.position)
        elif isinstance(part, ConditionalCrossAttention):
            _draw_apart(part.key_value)
        elif isinstance(part, SelfAttention):
            _as_multihead_attention(part, part.query_key, part.value)
        elif isinstance(part, CrossAttention):
            _as_multihead_attention(part, part.query, part.key, part.value)


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
    initialise_last(box_head)
    initialise_sizes(box_head, box_size_bias)


def initialise_last(head: MLP) -> None:
    """Start a head's outputs at 0, whatever the states.

    Args:
        head: changed in place.
    """
    last = _last_layer(head)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def initialise_refining_heads(
    class_heads: Iterable[nn.Module], box_heads: Iterable[nn.Module]
) -> None:
    """Rare objects, and boxes that stay where queries start.

    Args:
        class_heads: linear layers, changed in place.
        box_heads: MLPs, likewise.
    """
    for class_head in class_heads:
        assert isinstance(class_head, nn.Linear)
        initialise_class_head(class_head)
    for box_head in box_heads:
        assert isinstance(box_head, MLP)
        initialise_last(box_head)


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


def _as_multihead_attention(attention: MultiHeadAttention, *linears: nn.Linear) -> None:
    """As ``nn.MultiheadAttention`` in DETR: bounds of the [3 D, D] block, zero biases."""
    for linear in linears:
        _draw_apart(linear, gain=2**-0.5)
        nn.init.zeros_(linear.bias)
    nn.init.zeros_(attention.output.bias)


def attend_to_references(decoder: nn.Module, query_scale: MLP) -> None:
    """Let Conditional DETR's queries look around their reference points from the start.

    The spatial part of a cross-attention score is a product of two projections of sine encodings,
    one of the reference point and one of the cell (arXiv 2108.06152, equation 2). With random
    projections it says nothing about distance, and finding out where the points are takes most of
    a short training. With one projection for both it is a kernel that is highest where point and
    cell meet. That start is our choice, not the paper's.

    Args:
        decoder: changed in place, in every layer.
        query_scale: its transformation of reference points, which starts as 1.
    """
    for attention in decoder.modules():
        if not isinstance(attention, ConditionalCrossAttention):
            continue
        shared = _projection(attention.query_spatial.in_features, attention.heads)
        for linear in (attention.query_spatial, attention.key_position):
            linear.weight.data.copy_(shared)
            nn.init.zeros_(linear.bias)
    last = _last_layer(query_scale)
    nn.init.zeros_(last.weight)
    nn.init.ones_(last.bias)


def _projection(width: int, heads: int) -> Tensor:
    """[D, D] random, mostly of high frequencies, scaled so that a head's score peaks at PEAK."""
    frequencies = torch.arange(width // 4, dtype=torch.float32)
    share = torch.exp(-frequencies / FALLOFF).repeat_interleave(2).repeat(2)
    # Of a random projection to E channels: |W p|^2 is E times the mean square of share * p, and
    # sin^2 + cos^2 = 1. Scores are divided by the root of their 2 E channels.
    channels = width // heads
    score = channels * share.square().sum() / 2 / math.sqrt(2 * channels)
    return torch.randn(width, width) * share * (PEAK / score).sqrt()
