"""What methods that run the teacher's queries through the student's decoder are told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import model_validator

from d3etr.config.distillation import (
    AttentionConfig,
    AuxiliaryGroupConfig,
    CrossAttentionConfig,
    FeatureConfig,
    GeneralPointsConfig,
    LayerList,
    PredictionConfig,
    PredictionMethodConfig,
    Ratio,
    Share,
)
from d3etr.methods.denoising_points import DenoisingPointsConfig
from d3etr.methods.encoder_selection import SelectionConfig


class TeacherQueryConfig(PredictionMethodConfig):
    """What such methods share: the group, what is compared over pairs, layers, warm-up."""

    teacher_query_ratio: Share = 1.0
    """q: share of the teacher's queries, most confident first, in the auxiliary group."""
    prediction: PredictionConfig = PredictionConfig()
    self_attention: AttentionConfig = AttentionConfig()
    cross_attention: CrossAttentionConfig = CrossAttentionConfig()
    auxiliary_group: AuxiliaryGroupConfig = AuxiliaryGroupConfig()
    layer_map: Literal["uniform", "last"] | LayerList = "uniform"
    """Teacher layer for each student layer; a list names them, last must map to last."""
    minimum_confidence: Ratio = 0.0
    """A teacher query of less confidence than this counts 0 wherever pairs are weighted by
    confidence, in their normaliser too."""
    normaliser: Literal["confidence", "objects"] = "confidence"
    """What such pairs' losses are divided by. confidence: the teacher's total one, to which
    hundreds of queries that found nothing add up. objects: the number of objects, as detection
    losses; it does not depend on the number of queries."""

    @property
    def counts_confidence(self) -> bool:
        """Whether pairs are divided by the confidence of all of the teacher's queries."""
        return self.normaliser == "confidence" and not self.minimum_confidence

    @property
    def has_auxiliary_group(self) -> bool:
        """Whether the teacher's queries run through the student's decoder."""
        return True

    @property
    def points(self) -> GeneralPointsConfig | None:
        """General points, of methods that draw some: those that have ``general_points``."""
        return getattr(self, "general_points", None)

    @property
    def denoising_weight(self) -> float:
        """Of pairs of denoising queries, of methods that have ``denoising_points``."""
        points: DenoisingPointsConfig | None = getattr(self, "denoising_points", None)
        return points.weight if points else 0.0

    @property
    def selects(self) -> SelectionConfig | None:
        """Token scores of encoders, of methods that compare them: those with ``selection``."""
        selection: SelectionConfig | None = getattr(self, "selection", None)
        return selection if selection and selection.weight else None

    @property
    def compared_features(self) -> FeatureConfig | None:
        """Memories, of methods that compare them: those that have ``features``."""
        features: FeatureConfig | None = getattr(self, "features", None)
        return features if features and features.weight else None

    @property
    def kept_share(self) -> float:
        """Share of adaptive pairs that are kept, of methods that have ``matched_pair_ratio``."""
        return getattr(self, "matched_pair_ratio", 1.0)

    @property
    def fixed_share(self) -> float:
        """Weight of the terms over the auxiliary group, 1 - r in D3ETR."""
        return 1.0

    @property
    def compares_attention(self) -> bool:
        """Whether attention maps are compared."""
        return bool(self.self_attention.weight or self.cross_attention.weight)

    @property
    def kinds_of_pair_weights(self) -> frozenset[str]:
        """How terms that are on weight their pairs."""
        terms = self.prediction, self.self_attention, self.cross_attention
        used = [term.kinds_of_pair_weights for term in terms if term.weight]
        return frozenset().union(*used)

    @property
    def compares_pairs(self) -> bool:
        """Whether any term over pairs is on."""
        return bool(self.prediction.weight) or self.compares_attention

    @property
    def distils(self) -> bool:
        """Whether anything of the teacher's outputs is compared with."""
        beside = self.compared_features, self.selects
        return self.compares_pairs or any(term is not None for term in beside)

    @property
    def learns_without_labels(self) -> bool:
        """All but features, which are weighed by overlaps of the teacher's boxes with objects."""
        compares = self.compares_pairs or self.selects is not None
        return compares and self.normaliser == "confidence"

    @property
    def description(self) -> str:
        """The terms over pairs with their weights."""
        terms = {
            "predictions": self.prediction.weight,
            "self-attention": self.self_attention.weight,
            "cross-attention": self.cross_attention.weight,
        }
        shown = [f"{name} ({weight:g})" for name, weight in terms.items() if weight]
        if self.denoising_weight:
            shown.append(f"denoising points ({self.denoising_weight:g})")
        if self.selects is not None:
            shown.append(f"selection ({self.selects.weight:g})")
        shown += ["teacher refined"] * self.refine_teacher
        return ", ".join(shown) or "no distillation terms"

    def random_group_problem(self) -> str | None:
        """Why random queries in the auxiliary group contradict the rest, or None."""
        if self.auxiliary_group.queries == "teacher" or not self.has_auxiliary_group:
            return None
        if self.distils:
            return (
                "random auxiliary queries have no teacher outputs to distil: "
                "set all term weights to 0, or auxiliary_group.queries to 'teacher'"
            )
        if self.auxiliary_group.assignment == "teacher":
            return (
                "random auxiliary queries have no teacher assignment: "
                "set auxiliary_group.assignment to 'own'"
            )
        return None

    @model_validator(mode="after")
    def _no_setting_is_idle(self) -> Self:
        for problem in _idle_settings(self):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _denoising_points_are_compared(self) -> Self:
        if not self.denoising_weight:
            return self
        if not self.compares_pairs:
            raise ValueError("denoising_points have no effect: all term weights are 0")
        if self.cross_attention.weight and self.cross_attention.queries == "summed":
            raise ValueError(
                "cross_attention.queries 'summed' adds up the maps of all queries of an image, and "
                "of denoising_points some are made of no object: set denoising_points.weight to 0, "
                "or queries to 'each'"
            )
        return self

    @model_validator(mode="after")
    def _refined_predictions_are_compared(self) -> Self:
        if self.refine_teacher and not self.prediction.weight:
            raise ValueError("refine_teacher has no effect: prediction.weight is 0")
        return self

    @model_validator(mode="after")
    def _a_share_of_something(self) -> Self:
        if self.gradient_share is not None and not self.distils:
            raise ValueError("gradient_share has no effect: all term weights are 0")
        return self

    @model_validator(mode="after")
    def _the_group_learns(self) -> Self:
        if (
            self.has_auxiliary_group
            and not self.auxiliary_group.ground_truth
            and not self.compares_pairs
        ):
            raise ValueError(
                "the auxiliary group would learn nothing: all term weights are 0 and "
                "auxiliary_group.ground_truth is false"
            )
        if problem := self.random_group_problem():
            raise ValueError(problem)
        if self.cross_attention.distance == "points" and self.matches_adaptively:
            raise ValueError(
                "cross_attention.distance 'points' compares queries that are the same in both "
                "models, and adaptive pairs are not: set inherited_ratio to 1 or adaptive_ratio to "
                "0, or the distance to 'energy'"
            )
        return self


def _idle_settings(config: TeacherQueryConfig) -> Iterator[str]:
    """Settings of pairs and of the group that nothing reads, and why."""
    kinds, of_objects = config.kinds_of_pair_weights, config.normaliser == "objects"
    summed = "every" in kinds or config.selects is not None
    reason = "no term weights its pairs by confidence"
    if of_objects and not summed and kinds <= {"uniform"}:
        yield f"normaliser 'objects' has no effect: {reason}"
    if config.minimum_confidence and "confidence" not in kinds and (of_objects or not summed):
        yield f"minimum_confidence has no effect: {reason}, or is divided by it"
    for key in () if config.compares_pairs else ("matching_cost", "matched_pair_ratio"):
        field = type(config).model_fields.get(key)
        # By its value: stored configurations have keys that nobody set.
        if field is not None and getattr(config, key) != field.default:
            yield f"{key} has no effect: all term weights are 0"
    group = config.auxiliary_group
    if group.assignment == "own" and not group.ground_truth:
        yield (
            "auxiliary_group.assignment 'own' has no effect: ground_truth is false, and nothing is "
            "assigned; set it to 'teacher', or ground_truth to true"
        )
    if group.content is not None and group.queries == "random":
        found = f"auxiliary_group.content '{group.content}'"
        yield f"{found} has no effect on random queries: remove it"
    if group.always and config.fixed_share:
        yield "auxiliary_group.always has no effect, the group is built anyway: set it to false"
