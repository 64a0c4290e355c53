"""Distillation of self- and cross-attention maps of corresponding queries.

That both kinds of maps are distilled over matched queries is D3ETR's; the distance is our
choice: KL per query row and head by default.

Shapes: L layers · B images · H heads · N student and M teacher queries · P pairs · S tokens.
Scores are attention logits; masked keys hold ``structures.MASKED_SCORE``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, log_softmax

from d3etr.config.distillation import AttentionConfig
from d3etr.structures import MASKED_SCORE, Levels

_TINY = torch.finfo(torch.float32).tiny


def select_rows(scores: Tensor, index: Tensor | None) -> Tensor:
    """Rows of corresponding queries: [L, B, H, N, K] at [L, B, P] to [L, B, H, P, K]."""
    if index is None:
        return scores
    # Whole rows are copied, where a gather would look up each element.
    layers, batch, heads, queries, keys = scores.shape
    maps = torch.arange(layers * batch * heads, device=scores.device)
    rows = queries * maps.view(layers, batch, heads, 1) + index[:, :, None]
    picked = scores.reshape(-1, keys).index_select(0, rows.flatten())
    return picked.view(layers, batch, heads, -1, keys)


def select_pairs(scores: Tensor, index: Tensor | None) -> Tensor:
    """Rows and columns of a self-attention map: [L, B, H, N, N] to [L, B, H, P, P].

    The softmax over what is left renormalises the map to the matched queries.
    """
    if index is None:
        return scores
    pairs, queries = index.shape[-1], scores.shape[-1]
    cells = (queries * index[..., :, None] + index[..., None, :]).flatten(2)
    cells = cells[:, :, None].expand(-1, -1, scores.shape[2], -1)
    return scores.flatten(3).gather(3, cells).view(*scores.shape[:3], pairs, pairs)


def resize_maps(scores: Tensor, levels: Levels, target: Levels, padding: Tensor | None) -> Tensor:
    """Teacher maps on the student's grids, over its valid tokens, as scores again.

    Args:
        scores: [L, B, H, P, S'] on ``levels``.
        levels: (height, width) of each of the teacher's feature levels.
        target: those of the student's, as many.
        padding: [B, S] bool, True under the student's padding, or None.

    Returns:
        [L, B, H, P, S] logarithms of the resized probabilities.
    """
    parts = torch.split(scores.softmax(-1), [height * width for height, width in levels], -1)
    resized = [
        _resize_plane(part, grid, size)
        for part, grid, size in zip(parts, levels, target, strict=True)
    ]
    maps = torch.cat(resized, -1).clamp(min=_TINY).log()
    if padding is None:
        return maps
    return maps.masked_fill(padding[None, :, None, None], MASKED_SCORE)


def _resize_plane(maps: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[L, B, H, P, s'] on ``grid`` to [L, B, H, P, s] on ``size``; mass follows the area."""
    planes = maps.reshape(-1, 1, *grid)
    resized: Tensor = interpolate(planes, size=size, mode="bilinear", antialias=True)
    share = grid[0] * grid[1] / (size[0] * size[1])
    return resized.reshape(*maps.shape[:4], -1) * share


class _RowDivergence(torch.autograd.Function):
    """KL(softmax(teacher) || softmax(scores)) of each row.

    Its gradient is the difference of both maps, which is all that is kept. Computed from
    log-softmax, never from the logarithm of a probability, which would underflow.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, teacher: Tensor) -> Tensor:
        student, target = log_softmax(scores, -1), log_softmax(teacher, -1)
        probability = target.exp()
        rows = target.sub_(student).mul_(probability).sum(-1)
        ctx.save_for_backward(student.exp_().sub_(probability))
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return gradient[..., None] * difference, None


def _kl_rows(scores: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(scores)) of each row: [L, B, H, P]; the teacher is given."""
    rows: Tensor = _RowDivergence.apply(scores, teacher)
    return rows


def _mse_rows(scores: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of each row, summed over keys: [L, B, H, P]."""
    return (scores.softmax(-1) - teacher.softmax(-1)).square().sum(-1)


def _average_heads(scores: Tensor) -> Tensor:
    """Logarithm of the mean probability over heads: [L, B, H, P, K] to [L, B, 1, P, K]."""
    return log_softmax(scores, -1).logsumexp(2, keepdim=True) - math.log(scores.shape[2])


DISTANCES = {"kl": _kl_rows, "mse": _mse_rows}


def attention_loss(
    scores: Tensor, teacher: Tensor, weights: Tensor, config: AttentionConfig
) -> Tensor:
    """Distance of attention maps: weighted sum over images and pairs, mean over layers and heads.

    Args:
        scores: [L, B, H, P, K] student attention scores of the pairs.
        teacher: [L, B, H', P, K] teacher scores.
        weights: [L, B, P] weight of each pair, already divided by its normaliser.
        config: distance, and whether heads are compared apart (needs H = H') or averaged.

    Returns:
        Scalar.
    """
    scores, teacher = scores.float(), teacher.float()
    if config.heads == "averaged":
        scores, teacher = _average_heads(scores), _average_heads(teacher)
    rows = DISTANCES[config.distance](scores, teacher).mean(2)
    return (rows * weights).sum() / len(rows)
