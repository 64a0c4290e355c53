"""Initial weights with which Conditional DETR's queries look around their reference points.

The spatial part of a cross-attention score is a product of two projections of sine encodings, one
of the reference point and one of the cell (arXiv 2108.06152, equation 2). With random projections
it says nothing about distance, and finding out where the points are takes most of a short
training. With one projection for both it is a kernel that is highest where point and cell meet.
That start is our choice, not the paper's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from d3etr.detectors.attention import ConditionalCrossAttention
from d3etr.detectors.conditional_decoder import ConditionalDecoder

PEAK = 6.0
"""Score of a cell at the reference point, before training; far away it is about 0."""
FALLOFF = 6.0
"""Frequencies over which the projections' weights fall by a factor of e: low ones hardly tell
places apart."""


def attend_to_references(decoder: ConditionalDecoder) -> None:
    """Give queries and keys the same spatial projection, in every layer.

    Args:
        decoder: changed in place; its transformation of reference points starts as 1.
    """
    for attention in decoder.modules():
        if not isinstance(attention, ConditionalCrossAttention):
            continue
        shared = _projection(attention.query_spatial.in_features, attention.heads)
        for linear in (attention.query_spatial, attention.key_position):
            linear.weight.data.copy_(shared)
            nn.init.zeros_(linear.bias)
    last = decoder.query_scale.layers[-1]
    assert isinstance(last, nn.Linear)
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
