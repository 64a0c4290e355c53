"""MixMatcher: distillation terms over adaptive and fixed correspondences, mixed by a ratio.

L_distil = r L_adaptive + (1 - r) L_fixed. That adaptive and fixed matching are mixed, and that
each carries predictions, self- and cross-attention, is D3ETR's; the ratio and its default of
0.5 are ours.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from d3etr.attention_maps import AttentionMaps
from d3etr.config.distillation import AttentionConfig, DistillationConfig
from d3etr.distillation.attention import attention_loss, resize_maps
from d3etr.distillation.correspondence import Correspondence
from d3etr.distillation.prediction import prediction_losses
from d3etr.structures import DecoderOutputs

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Branch:
    """One set of corresponding queries, ready to be compared.

    Attributes:
        student: outputs of a student's query group.
        teacher: teacher outputs in as many layers.
        pairs: which teacher query corresponds to which student query.
        confidence: [L] normaliser of pairs weighted by the teacher's confidence.
        images: scalar, images in the global batch; normaliser of pairs that weigh the same.
        shares: [L, B] what the confidence in an image's pairs is scaled to sum to where the teacher
            has more queries; None leaves it.
    """

    student: DecoderOutputs
    teacher: DecoderOutputs
    pairs: Correspondence
    confidence: Tensor
    images: Tensor
    shares: Tensor | None = None

    def weights(self, kind: str) -> Tensor:
        """[L, B, P] weight of each pair divided by its normaliser."""
        confidence = self.pairs.of_teacher(self.teacher.confidence().float()[..., None])[..., 0]
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


def _prediction(branch: Branch, config: DistillationConfig) -> dict[str, Tensor]:
    pairs, student, teacher = branch.pairs, branch.student, branch.teacher
    return prediction_losses(
        pairs.of_student(student.logits).float(),
        pairs.of_student(student.boxes_cxcywh).float(),
        pairs.of_teacher(teacher.logits).float(),
        pairs.of_teacher(teacher.boxes_cxcywh).float(),
        branch.weights(config.prediction.class_pair_weights),
        branch.weights(config.prediction.pair_weights),
        config.prediction,
    )


def _known(maps: AttentionMaps | None) -> AttentionMaps:
    if maps is None:
        raise ValueError("attention is distilled, but a decoder was not asked for its maps")
    return maps


def _self_attention(branch: Branch, config: AttentionConfig) -> Tensor:
    """Rows and columns follow the correspondence, renormalised to the corresponding queries."""
    pairs = branch.pairs
    student = _known(branch.student.self_maps).pairs(pairs.student)
    teacher = _known(branch.teacher.self_maps).pairs(pairs.teacher)
    return attention_loss(student, teacher, branch.weights(config.pair_weights), config)


def _cross_attention(branch: Branch, config: AttentionConfig) -> Tensor:
    """Rows follow the correspondence; a teacher's map on other grids is resized."""
    pairs, student, teacher = branch.pairs, branch.student, branch.teacher
    if student.levels == ((1, 1),):
        warnings.warn(
            "distillation.cross_attention is 0 for a batch: its images are one token each, and all "
            "attention is on it. Use larger images or a smaller stride, or set its weight to 0",
            stacklevel=2,
        )
    maps = _known(student.cross_maps).rows(pairs.student)
    target = _known(teacher.cross_maps).rows(pairs.teacher)
    if teacher.levels != student.levels:
        target = resize_maps(
            target, teacher.levels, teacher.padding, student.levels, student.padding
        )
    return attention_loss(maps, target, branch.weights(config.pair_weights), config)


def branch_losses(branch: Branch, config: DistillationConfig) -> dict[str, Tensor]:
    """Every configured term over one set of correspondences, weighted.

    Returns:
        Scalars ``class``, ``l1``, ``giou``, ``self_attention``, ``cross_attention``, those
        that are on.
    """
    losses: dict[str, Tensor] = {}
    if config.prediction.weight:
        terms = _prediction(branch, config)
        losses |= {name: config.prediction.weight * loss for name, loss in terms.items()}
    if config.self_attention.weight:
        loss = _self_attention(branch, config.self_attention)
        losses["self_attention"] = config.self_attention.weight * loss
    if config.cross_attention.weight:
        loss = _cross_attention(branch, config.cross_attention)
        losses["cross_attention"] = config.cross_attention.weight * loss
    return losses


def mix(branches: dict[str, Branch], config: DistillationConfig) -> dict[str, Tensor]:
    """Mix the branches: r L_adaptive + (1 - r) L_fixed + w L_general.

    Args:
        branches: ``adaptive``, ``fixed`` and ``general``, those that there are.
        config: ratio and weights.

    Returns:
        Named scalars ``adaptive/..``, ``fixed/..`` and ``general/..``.
    """
    losses: dict[str, Tensor] = {}
    shares = {
        "adaptive": config.adaptive_ratio,
        "fixed": 1 - config.adaptive_ratio,
        "general": config.general_points.weight,
    }
    for name, branch in branches.items():
        terms = branch_losses(branch, config)
        losses |= {f"{name}/{term}": shares[name] * loss for term, loss in terms.items()}
    return losses
