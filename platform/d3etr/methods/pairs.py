"""Pairs of corresponding queries, and the losses over them: predictions and both attentions.

Correspondences answer the question that DETR's unordered outputs pose (D3ETR, abstract): adaptive
ones are found by bipartite matching in every decoder layer, fixed ones hold by construction because
the auxiliary group's queries *are* the teacher's. That matched queries carry predictions, self- and
cross-attention is D3ETR's.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from d3etr.attention_maps import (
    MASKED_SCORE,
    AttentionMaps,
    CrossMaps,
    ProductMaps,
    SampledMaps,
    ScoredMaps,
    hidden_by_either,
)
from d3etr.config.distillation import AttentionConfig, CrossAttentionConfig
from d3etr.errors import UserError
from d3etr.losses.attention import (
    attention_loss,
    blurred_maps,
    merged_maps,
    of_levels,
    resize_maps,
    some_levels,
    summed_maps,
)
from d3etr.losses.prediction import prediction_losses
from d3etr.losses.sampled_points import energy_loss, point_loss
from d3etr.matching.assignment import gather_queries
from d3etr.structures import DecoderOutputs

if TYPE_CHECKING:
    from d3etr.methods.teacher_query_config import TeacherQueryConfig

_TINY = torch.finfo(torch.float32).tiny
LevelPairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Correspondence:
    """Pairs of teacher and student queries, per layer and image.

    An index of None means "all queries, in order", which spares the gather.

    Attributes:
        teacher: [L, B, P] indices of teacher queries, or None.
        student: [L, B, P] indices of student queries, or None.
    """

    teacher: Tensor | None = None
    student: Tensor | None = None

    def of_teacher(self, values: Tensor) -> Tensor:
        """Select pairs: [L, B, M, K] to [L, B, P, K]."""
        return values if self.teacher is None else gather_queries(values, self.teacher)

    def of_student(self, values: Tensor) -> Tensor:
        """Select pairs: [L, B, N, K] to [L, B, P, K]."""
        return values if self.student is None else gather_queries(values, self.student)


FIXED = Correspondence()
"""Fixed Matching: query i of the auxiliary group corresponds to teacher query i."""


def counted_confidence(outputs: DecoderOutputs, minimum: float) -> Tensor:
    """[L, B, M] float32: the teacher's confidence in each query, 0 where below ``minimum``."""
    confidence = outputs.confidence().float()
    return confidence.where(confidence >= minimum, 0.0) if minimum else confidence


@dataclass(frozen=True)
class MatchedPairs:
    """Corresponding queries of student and teacher, ready to be compared.

    Attributes:
        student: outputs of a student's query group.
        teacher: teacher outputs in as many layers.
        index: which teacher query corresponds to which student query.
        confidence: [L] normaliser of pairs weighted by the teacher's confidence, of its sum or of
            what the configuration has instead.
        images: scalar, images in the global batch; normaliser of pairs that weigh the same. Of
            pairs that are ``counted``: the sum of that over the global batch.
        shares: [L, B] what the confidence in an image's pairs is scaled to sum to where the teacher
            has more queries; None leaves it.
        counted: [B, P] factor on the weight of each pair, the same pattern in each block of queries
            that attend to each other; None: each counts 1.
    """

    student: DecoderOutputs
    teacher: DecoderOutputs
    index: Correspondence
    confidence: Tensor
    images: Tensor
    shares: Tensor | None = None
    counted: Tensor | None = None

    def weights(self, kind: str, config: TeacherQueryConfig) -> Tensor:
        """[L, B, P] weight of each pair divided by its normaliser.

        Args:
            kind: ``uniform``, ``every`` or ``confidence``.
            config: what the teacher's confidence counts.
        """
        counted = counted_confidence(self.teacher, config.minimum_confidence)
        confidence = self.index.of_teacher(counted[..., None])[..., 0]
        if kind == "uniform" and self.counted is not None:
            return (self.counted / self.images.clamp(min=_TINY)).expand_as(confidence)
        if kind == "uniform":
            return torch.ones_like(confidence) / (confidence.shape[-1] * self.images)
        # A batch may have no object, or none of which the teacher is sure enough.
        least = _TINY if config.counts_confidence else 1.0
        divisor = self.confidence.clamp(min=least)[:, None, None]
        if kind == "every":
            each = torch.ones_like(confidence) if self.counted is None else self.counted
            return each / divisor
        if self.counted is not None:
            confidence = confidence * self.counted
        # Else the most confident teacher queries have pairs, and weigh what they should.
        if self.shares is not None and self.student.queries < self.teacher.queries:
            found = confidence.sum(-1, keepdim=True).clamp(min=_TINY)
            confidence = confidence / found * self.shares[..., None]
        return confidence / divisor


@overload
def _known(maps: AttentionMaps | None) -> AttentionMaps: ...
@overload
def _known(maps: CrossMaps | None) -> CrossMaps: ...
def _known(maps: CrossMaps | None) -> CrossMaps:
    if maps is None:
        raise ValueError("attention is distilled, but a decoder was not asked for its maps")
    return maps


def _self_attention(pairs: MatchedPairs, weights: Tensor, config: AttentionConfig) -> Tensor:
    """Rows and columns follow the correspondence, renormalised to the corresponding queries."""
    student = _known(pairs.student.self_maps).pairs(pairs.index.student)
    teacher = _known(pairs.teacher.self_maps).pairs(pairs.index.teacher)
    if pairs.counted is not None:
        student, teacher = (_among(maps, pairs.counted) for maps in (student, teacher))
    return attention_loss(student, teacher, weights, config)


def _among(maps: AttentionMaps, counted: Tensor) -> ScoredMaps:
    """Maps over the queries of each block that count, [L, B, H, P, P / K]; renormalised to them."""
    scores = maps.scores()
    idle = counted[:, : scores.shape[-1]] == 0
    return ScoredMaps(scores.masked_fill(idle[:, None, None], MASKED_SCORE))


def _cross_attention(
    pairs: MatchedPairs, weights: Tensor, config: CrossAttentionConfig, levels: LevelPairs | None
) -> Tensor:
    """Rows follow the correspondence; a teacher's map comes to the student's grids."""
    index, student, teacher = pairs.index, pairs.student, pairs.teacher
    maps = _known(student.cross_maps)
    if config.detach_queries:
        if not isinstance(maps, ProductMaps):
            raise UserError(
                "distillation.cross_attention.detach_queries needs a student whose attention keeps "
                "its keys (d3etr's MultiHeadAttention), and this one gives scores: set it to false"
            )
        maps = maps.of_keys()
    maps = maps.rows(index.student)
    target = _known(teacher.cross_maps).rows(index.teacher)
    if config.distance in ("energy", "points"):
        assert isinstance(maps, SampledMaps) and isinstance(target, SampledMaps)
        of_points = energy_loss if config.distance == "energy" else point_loss
        return of_points(maps, target, weights, config)
    if config.queries == "summed":
        maps, target = summed_maps(maps), summed_maps(target)
        weights = weights.sum(-1, keepdim=True)
    if config.levels == "merged":
        grid = student.levels[0]
        padding = _padding_of(student, [0])
        maps, target = (
            merged_maps(part, outputs.levels, grid, padding)
            for part, outputs in ((maps, student), (target, teacher))
        )
        student = replace(student, levels=(grid,), padding=padding)
        teacher = student
    elif levels is not None:
        maps, student = _of_levels(maps, student, [own for own, _ in levels])
        target, teacher = _of_levels(target, teacher, [theirs for _, theirs in levels])
    if student.levels == ((1, 1),):
        warnings.warn(
            "distillation.cross_attention is 0 for a batch: its images are one token each, and all "
            "attention is on it. Use larger images or a smaller stride, or set its weight to 0",
            stacklevel=2,
        )
    maps, target, padding = _over_the_same_cells(maps, student, target, teacher)
    if config.blur:
        grids = student.levels, padding, config.blur
        maps, target = blurred_maps(maps, *grids), blurred_maps(target, *grids)
    return attention_loss(maps, target, weights, config)


def _over_the_same_cells(
    maps: CrossMaps, student: DecoderOutputs, target: CrossMaps, teacher: DecoderOutputs
) -> tuple[CrossMaps, CrossMaps, Tensor | None]:
    """Both maps over the student's cells that no padding hides, and what is hidden of them.

    Of equal grids each has a padding of its own: pictures of other sizes, and stored ones, end in
    other cells. Rows are renormalised to what both see.
    """
    hidden = student.padding
    if teacher.levels == student.levels:
        hidden = hidden_by_either(hidden, teacher.padding)
        return maps.hiding(hidden), target.hiding(hidden), hidden
    if isinstance(target, SampledMaps):
        return maps, target.on(student.levels, hidden), hidden
    resized = resize_maps(target, teacher.levels, teacher.padding, student.levels, hidden)
    return maps, resized, hidden


def _of_levels(
    maps: CrossMaps, outputs: DecoderOutputs, kept: list[int]
) -> tuple[CrossMaps, DecoderOutputs]:
    """Maps over some feature levels, and what they are on."""
    own = tuple(outputs.levels[level] for level in kept)
    padding = _padding_of(outputs, kept)
    return some_levels(maps, outputs.levels, kept), replace(outputs, levels=own, padding=padding)


def _padding_of(outputs: DecoderOutputs, kept: list[int]) -> Tensor | None:
    hidden = outputs.padding
    return None if hidden is None else of_levels(hidden, outputs.levels, kept)


def pair_losses(
    prefix: str,
    weight: float,
    pairs: MatchedPairs,
    config: TeacherQueryConfig,
    levels: LevelPairs | None = None,
) -> dict[str, Tensor]:
    """Every configured term over one set of correspondences: w_pred L_pred + w_self ... .

    Args:
        prefix: of the terms' names.
        weight: of all of them.
        pairs: what corresponds.
        config: form and weight of each term.
        levels: numbers of student's and teacher's feature levels of the same stride; None: they
            correspond by their number.

    Returns:
        Scalars ``PREFIX/class``, ``l1``, ``giou``, ``self_attention``, ``cross_attention``, those
        that are on.
    """
    losses: dict[str, Tensor] = {}
    # Over no queries, which have no maps, nothing is lost.
    queries, nothing = pairs.student.queries, pairs.images.new_zeros(())
    if config.prediction.weight:
        index, student, teacher = pairs.index, pairs.student, pairs.teacher
        terms = prediction_losses(
            index.of_student(student.logits).float(),
            index.of_student(student.boxes_cxcywh).float(),
            index.of_teacher(teacher.logits).float(),
            index.of_teacher(teacher.boxes_cxcywh).float(),
            pairs.weights(config.prediction.class_pair_weights, config),
            pairs.weights(config.prediction.pair_weights, config),
            config.prediction,
        )
        losses |= {name: config.prediction.weight * loss for name, loss in terms.items()}
    if config.self_attention.weight:
        weights = pairs.weights(config.self_attention.pair_weights, config)
        within = config.self_attention
        loss = _self_attention(pairs, weights, within) if queries else nothing
        losses["self_attention"] = config.self_attention.weight * loss
    if config.cross_attention.weight:
        weights = pairs.weights(config.cross_attention.pair_weights, config)
        across = config.cross_attention
        loss = _cross_attention(pairs, weights, across, levels) if queries else nothing
        losses["cross_attention"] = config.cross_attention.weight * loss
    return {f"{prefix}/{name}": weight * loss for name, loss in losses.items()}
