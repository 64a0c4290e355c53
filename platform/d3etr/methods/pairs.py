"""Losses over pairs of corresponding queries: predictions, self- and cross-attention.

That matched queries carry all three is D3ETR's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from d3etr.attention_maps import AttentionMaps
from d3etr.config.distillation import AttentionConfig, PredictionConfig
from d3etr.losses.attention import attention_loss, resize_maps
from d3etr.losses.prediction import prediction_losses
from d3etr.methods.correspondence import Correspondence
from d3etr.structures import DecoderOutputs

_TINY = torch.finfo(torch.float32).tiny


class PairTerms(Protocol):
    """Configuration of what is compared over pairs."""

    @property
    def prediction(self) -> PredictionConfig:
        """Class logits and boxes."""
        ...

    @property
    def self_attention(self) -> AttentionConfig:
        """How queries attend to each other."""
        ...

    @property
    def cross_attention(self) -> AttentionConfig:
        """How they attend to the image."""
        ...


def compares_anything(config: PairTerms) -> bool:
    """Whether any term over pairs is on."""
    return bool(config.prediction.weight) or compares_attention(config)


def compares_attention(config: PairTerms) -> bool:
    """Whether attention maps are compared."""
    return bool(config.self_attention.weight or config.cross_attention.weight)


@dataclass(frozen=True)
class MatchedPairs:
    """Corresponding queries of student and teacher, ready to be compared.

    Attributes:
        student: outputs of a student's query group.
        teacher: teacher outputs in as many layers.
        index: which teacher query corresponds to which student query.
        confidence: [L] normaliser of pairs weighted by the teacher's confidence.
        images: scalar, images in the global batch; normaliser of pairs that weigh the same.
        shares: [L, B] what the confidence in an image's pairs is scaled to sum to where the teacher
            has more queries; None leaves it.
    """

    student: DecoderOutputs
    teacher: DecoderOutputs
    index: Correspondence
    confidence: Tensor
    images: Tensor
    shares: Tensor | None = None

    def weights(self, kind: str) -> Tensor:
        """[L, B, P] weight of each pair divided by its normaliser."""
        confidence = self.index.of_teacher(self.teacher.confidence().float()[..., None])[..., 0]
        if kind == "uniform":
            return torch.ones_like(confidence) / (confidence.shape[-1] * self.images)
        divisor = self.confidence.clamp(min=_TINY)[:, None, None]
        if kind == "every":
            return torch.ones_like(confidence) / divisor
        # Else the most confident teacher queries have pairs, and weigh what they should.
        if self.shares is not None and self.student.queries < self.teacher.queries:
            found = confidence.sum(-1, keepdim=True).clamp(min=_TINY)
            confidence = confidence / found * self.shares[..., None]
        return confidence / divisor


def _prediction(pairs: MatchedPairs, config: PairTerms) -> dict[str, Tensor]:
    index, student, teacher = pairs.index, pairs.student, pairs.teacher
    return prediction_losses(
        index.of_student(student.logits).float(),
        index.of_student(student.boxes_cxcywh).float(),
        index.of_teacher(teacher.logits).float(),
        index.of_teacher(teacher.boxes_cxcywh).float(),
        pairs.weights(config.prediction.class_pair_weights),
        pairs.weights(config.prediction.pair_weights),
        config.prediction,
    )


def _known(maps: AttentionMaps | None) -> AttentionMaps:
    if maps is None:
        raise ValueError("attention is distilled, but a decoder was not asked for its maps")
    return maps


def _self_attention(pairs: MatchedPairs, config: AttentionConfig) -> Tensor:
    """Rows and columns follow the correspondence, renormalised to the corresponding queries."""
    student = _known(pairs.student.self_maps).pairs(pairs.index.student)
    teacher = _known(pairs.teacher.self_maps).pairs(pairs.index.teacher)
    return attention_loss(student, teacher, pairs.weights(config.pair_weights), config)


def _cross_attention(pairs: MatchedPairs, config: AttentionConfig) -> Tensor:
    """Rows follow the correspondence; a teacher's map on other grids is resized."""
    index, student, teacher = pairs.index, pairs.student, pairs.teacher
    if student.levels == ((1, 1),):
        warnings.warn(
            "distillation.cross_attention is 0 for a batch: its images are one token each, and all "
            "attention is on it. Use larger images or a smaller stride, or set its weight to 0",
            stacklevel=2,
        )
    maps = _known(student.cross_maps).rows(index.student)
    target = _known(teacher.cross_maps).rows(index.teacher)
    if teacher.levels != student.levels:
        target = resize_maps(
            target, teacher.levels, teacher.padding, student.levels, student.padding
        )
    return attention_loss(maps, target, pairs.weights(config.pair_weights), config)


def pair_losses(pairs: MatchedPairs, config: PairTerms) -> dict[str, Tensor]:
    """Every configured term over one set of correspondences, weighted.

    Returns:
        Scalars ``class``, ``l1``, ``giou``, ``self_attention``, ``cross_attention``, those
        that are on.
    """
    losses: dict[str, Tensor] = {}
    if config.prediction.weight:
        terms = _prediction(pairs, config)
        losses |= {name: config.prediction.weight * loss for name, loss in terms.items()}
    if config.self_attention.weight:
        loss = _self_attention(pairs, config.self_attention)
        losses["self_attention"] = config.self_attention.weight * loss
    if config.cross_attention.weight:
        loss = _cross_attention(pairs, config.cross_attention)
        losses["cross_attention"] = config.cross_attention.weight * loss
    return losses


def scaled(prefix: str, factor: float, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses times a factor, their names below a prefix."""
    return {f"{prefix}/{name}": factor * loss for name, loss in losses.items()}
