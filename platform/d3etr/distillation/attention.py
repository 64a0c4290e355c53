"""Distillation of self- and cross-attention maps of corresponding queries.

That both kinds of maps are distilled over matched queries is D3ETR's; the distance is our
choice: KL per query row and head by default.

Shapes: L layers · B images · H heads · N student and M teacher queries · P pairs · S tokens.
Scores are attention logits; masked keys hold ``structures.MASKED_SCORE``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate, log_softmax, softmax

from d3etr.config.distillation import AttentionConfig


def select_rows(scores: Tensor, index: Tensor | None) -> Tensor:
    """Rows of corresponding queries: [L, B, H, N, K] at [L, B, P] to [L, B, H, P, K]."""
    if index is None:
        return scores
    shape = (*scores.shape[:3], index.shape[-1], scores.shape[-1])
    return scores.gather(3, index[:, :, None, :, None].expand(shape))


def select_columns(scores: Tensor, index: Tensor | None) -> Tensor:
    """Columns of corresponding queries: [L, B, H, K, N] at [L, B, P] to [L, B, H, K, P].

    The softmax over what is left renormalises the map to the matched queries.
    """
    if index is None:
        return scores
    shape = (*scores.shape[:4], index.shape[-1])
    return scores.gather(4, index[:, :, None, None, :].expand(shape))


def select_pairs(scores: Tensor, index: Tensor | None) -> Tensor:
    """Rows and columns of a self-attention map: [L, B, H, N, N] to [L, B, H, P, P]."""
    return select_columns(select_rows(scores, index), index)


def resize_maps(
    attention: Tensor, grid: tuple[int, int], target: tuple[int, int], padding: Tensor | None
) -> Tensor:
    """Teacher maps on the student's grid, renormalised over its valid tokens.

    Args:
        attention: [L, B, H, P, S'] probabilities on ``grid``.
        grid: (height, width) with S' = height * width.
        target: (height, width) of the student's memory.
        padding: [B, S] bool, True under the student's padding, or None.

    Returns:
        [L, B, H, P, S], rows sum to 1.
    """
    height, width = target
    planes = attention.reshape(-1, 1, *grid)
    resized: Tensor = interpolate(planes, size=target, mode="bilinear", antialias=True)
    maps = resized.reshape(*attention.shape[:4], height * width)
    if padding is not None:
        maps = maps.masked_fill(padding[None, :, None, None], 0.0)
    smallest = torch.finfo(torch.float32).tiny
    return maps / maps.sum(-1, keepdim=True).clamp(min=smallest)


def _kl_rows(scores: Tensor, teacher: Tensor, averaged: bool) -> Tensor:
    """KL(teacher || student) of each row: [L, B, H or 1, P].

    The student enters as log-softmax of its scores: log(softmax) underflows, and an epsilon
    inside the logarithm would lose the gradient where it is needed most.
    """
    log_student = log_softmax(scores, -1)
    if averaged:
        log_student = log_student.logsumexp(2, keepdim=True) - math.log(scores.shape[2])
        teacher = teacher.mean(2, keepdim=True)
    entropy: Tensor = torch.special.entr(teacher).sum(-1)
    return -(teacher * log_student).sum(-1) - entropy


def _mse_rows(scores: Tensor, teacher: Tensor, averaged: bool) -> Tensor:
    """Squared distance of each row, summed over keys: [L, B, H or 1, P]."""
    student = softmax(scores, -1)
    if averaged:
        student, teacher = student.mean(2, keepdim=True), teacher.mean(2, keepdim=True)
    return (student - teacher).square().sum(-1)


def attention_loss(
    scores: Tensor, teacher: Tensor, weights: Tensor, config: AttentionConfig
) -> Tensor:
    """Distance of attention maps: weighted sum over layers, images, pairs; mean over heads.

    Args:
        scores: [L, B, H, P, K] student attention scores of the pairs.
        teacher: [L, B, H', P, K] teacher attention, rows sum to 1.
        weights: [L, B, P] weight of each pair, already divided by its normaliser.
        config: distance, and whether heads are compared apart (needs H = H') or averaged.

    Returns:
        Scalar.
    """
    rows = {"kl": _kl_rows, "mse": _mse_rows}[config.distance]
    distance = rows(scores.float(), teacher, config.heads == "averaged")
    return (distance.mean(2) * weights).sum()
