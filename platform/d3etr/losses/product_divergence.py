"""KL of attention maps that are products of queries and keys, a few maps at a time.

What is kept for the backward pass is the gradient by queries and keys, which are small; the maps
are in memory only while the cache holds them. On a GPU ``kernels/map_divergence.py`` does the same.

Shapes: L layers · B images · H heads · P pairs (rows of the maps) · K keys · E channels of the
student's queries and keys, E' of the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d3etr.attention_maps import MASKED_SCORE, ProductMaps, hidden_by_either

_CELLS = 2**20
"""Cells of the maps that are held at once."""


class _ProductDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        others: Tensor,
        other_keys: Tensor,
        weights: Tensor,
        hidden: Tensor | None,
    ) -> Tensor:
        maps = max(1, _CELLS // (query.shape[1:3].numel() * key.shape[2]))
        given = query, key, others, other_keys, weights
        pieces = [*zip(*(torch.split(part, maps) for part in given), strict=True)]
        masks = [None] * len(pieces) if hidden is None else torch.split(hidden, maps)
        found = [_some_maps(piece, mask) for piece, mask in zip(pieces, masks, strict=True)]
        sums, by_query, by_key = zip(*found, strict=True)
        ctx.save_for_backward(torch.cat(by_query), torch.cat(by_key))
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        by_query, by_key = ctx.saved_tensors
        return gradient * by_query, gradient * by_key, None, None, None, None


def _some_maps(given: Sequence[Tensor], hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of the divergences, and its gradients by queries and keys.

    Args:
        given: of M maps queries [M, H, P, E] multiplied by the student's scale and keys
            [M, H, K, E], both of the teacher, and weights [M, 1, P] of rows.
        hidden: [M, 1, 1, K] bool, or None.
    """
    query, key, others, other_keys, weights = given
    scores, target = query @ key.mT, others @ other_keys.mT
    if hidden is not None:
        scores.masked_fill_(hidden, MASKED_SCORE)
        target.masked_fill_(hidden, MASKED_SCORE)
    # From differences of scores, never from the logarithm of a probability, which would underflow.
    apart = target - scores
    logsum, teacher_logsum = _softmax_in_place(scores), _softmax_in_place(target)
    apart.sub_((teacher_logsum - logsum)[..., None])  # before sums, so that equal maps give 0
    rows = apart.mul_(target).sum(-1)
    difference = scores.sub_(target).mul_(weights[..., None])
    return (rows * weights).sum(), difference @ key, difference.mT @ query


def _softmax_in_place(scores: Tensor) -> Tensor:
    """Scores become probabilities; returns the logarithm of the sum of their exponentials."""
    highest = scores.amax(-1, keepdim=True)
    total = scores.sub_(highest).exp_().sum(-1, keepdim=True)
    scores.div_(total)
    return (highest + total.log())[..., 0]


def product_divergence(student: ProductMaps, teacher: ProductMaps, weights: Tensor) -> Tensor:
    """Weighted sum of KL(teacher's map || student's map); mean over heads.

    Keys that either hides are in neither map.

    Args:
        student: [L, B, H, P, E] queries and [L, B, H, K, E] keys, which have a gradient.
        teacher: the same rows and keys in as many heads, with E' channels.
        weights: [L, B, P] of each row.

    Returns:
        Scalar.
    """
    query, others = (maps.query.float().flatten(0, 1) * maps.scale for maps in (student, teacher))
    key, other_keys = (maps.key.float().flatten(0, 1) for maps in (student, teacher))
    each = (weights.float() / query.shape[1]).flatten(0, 1)[:, None]
    hidden = hidden_by_either(student.padding, teacher.padding)
    if hidden is not None:
        layers = len(student.query)
        hidden = hidden.expand(layers, -1, -1).flatten(0, 1)[:, None, None]
    with torch.autocast(query.device.type, enabled=False):  # losses need digits
        found: Tensor = _ProductDivergence.apply(query, key, others, other_keys, each, hidden)
    return found
