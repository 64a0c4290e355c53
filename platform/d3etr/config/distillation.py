"""Configuration of what is distilled, over which pairs, and how strongly."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from d3etr.config.base import MAXIMUM, Section
from d3etr.config.methods import with_method

# YAML knows lists only, and what a method has been put under is no JSON any more.
LayerList = Annotated[tuple[Annotated[int, Field(ge=0, le=MAXIMUM)], ...], Field(strict=False)]
Weight = Annotated[float, Field(ge=0, le=MAXIMUM)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class MatchingCostConfig(Section):
    """Cost of pairing a student query with a teacher query (Adaptive Matching)."""

    class_distance: Literal["l2", "bce"] = "l2"
    """l2: distance of class probabilities. bce: cross entropy with the teacher's as target."""
    class_cost: Weight = 2.0
    """Weight of the class distance."""
    l1_cost: Weight = 5.0
    """Weight of the L1 distance of boxes."""
    giou_cost: Weight = 2.0
    """Weight of 1 - GIoU of boxes."""

    @model_validator(mode="after")
    def _something_costs(self) -> Self:
        if self.class_cost == self.l1_cost == self.giou_cost == 0:
            raise ValueError("all matching costs are 0: no pair would be better than another")
        return self


class PredictionConfig(Section):
    """Distillation of class logits and boxes."""

    weight: Weight = 2.0
    """Of the whole term in the total loss; 0 switches it off."""
    class_loss: Literal["focal", "bce", "kl"] = "focal"
    """focal: |p' - p|^2 BCE(z, p'). bce: soft-target BCE. kl: softmax KL with temperature. p are a
    detector's class probabilities and z their logits, log(p / (1 - p)), with ``classification:
    softmax`` too; "no object" is what they leave, and kl, which compares shares of z, misses it."""
    temperature: Annotated[float, Field(gt=0, le=MAXIMUM)] = 1.0
    """Used by ``kl`` only."""
    class_weight: Weight = 4.0
    """Weight of the class loss within the term."""
    l1_weight: Weight = 5.0
    """Weight of the L1 distance of boxes within the term."""
    giou_weight: Weight = 2.0
    """Weight of 1 - GIoU of boxes within the term."""
    pair_weights: Literal["confidence", "uniform"] = "confidence"
    """Of boxes. confidence: a pair counts as much as the teacher is sure of its query."""
    class_pair_weights: Literal["every", "confidence", "uniform"] = "every"
    """Of classes. every: each pair counts 1 and the sum is divided by the teacher's total
    confidence, as the focal loss is by the number of objects; a query that says "nothing here"
    teaches as much about classes as one that is sure."""

    layers: Literal["sum", "mean"] = "sum"
    """Over decoder layers. sum: as the detection losses of all layers are added (DETR). mean: as
    attention terms by default, so that their weight beside them is the same at any depth."""

    @model_validator(mode="after")
    def _temperature_has_effect(self) -> Self:
        if self.temperature != 1 and self.class_loss != "kl":
            raise ValueError(
                f"temperature has no effect on class_loss '{self.class_loss}', only on 'kl'"
            )
        if self.weight and not (self.class_weight or self.l1_weight or self.giou_weight):
            raise ValueError("weight is set but class_weight, l1_weight and giou_weight are all 0")
        return self


class AttentionConfig(Section):
    """Distillation of one kind of attention map; the mean over heads and pairs."""

    weight: Weight = 2.0
    """Of the term in the total loss; 0 switches it off."""
    distance: Literal["kl", "mse"] = "kl"
    """Between two attention maps. kl: Kullback-Leibler divergence of each row. mse: mean squared
    difference."""
    heads: Literal["apart", "averaged"] = "apart"
    """apart needs equal head counts; averaged compares the mean over heads."""
    pair_weights: Literal["confidence", "uniform"] = "uniform"
    """confidence: a pair counts as much as the teacher is sure of its query. uniform: all pairs
    count the same."""
    layers: Literal["sum", "mean"] = "mean"
    """Over decoder layers. mean: beside summed prediction terms, twice the layers halve what
    attention counts. sum: its weight beside them is the same at any depth."""


class AuxiliaryGroupConfig(Section):
    """The training-only query group of Fixed Matching."""

    queries: Literal["teacher", "random"] = "teacher"
    """random: frozen random queries, the control that shows what the teacher's are worth."""
    assignment: Literal["teacher", "own"] = "teacher"
    """Whose Hungarian assignment supervises the group with ground truth."""
    ground_truth: bool = True
    """Supervise the group with ground truth at all."""
    always: bool = False
    """Build the group also where adaptive_ratio 1 distils nothing over it."""


class GeneralPointsConfig(Section):
    """Fresh random queries that both models decode in each step (KD-DETR's general points)."""

    count: Annotated[int, Field(ge=0, le=MAXIMUM)] = 0
    """How many; 0 draws none."""
    weight: Weight = 1.0
    """Of their losses beside those of the other pairs."""

    @model_validator(mode="after")
    def _weight_has_effect(self) -> Self:
        if self.count and not self.weight:
            raise ValueError("points are drawn but their weight is 0: set count to 0")
        return self


class FeatureConfig(Section):
    """Distillation of memory tokens where the teacher sees objects (DETRDistill's)."""

    weight: Weight = 0.0
    """Of the term in the total loss; 0 switches it off."""
    queries: Annotated[int, Field(ge=1, le=MAXIMUM)] = 100
    """The teacher's best queries, whose likeness to a token says how much it counts."""


class DistillationConfig(Section):
    """Method, matching ratios, loss terms."""

    method: Literal["none", "d3etr", "kd_detr", "detrdistill"] = "none"
    """What the settings below are unless a recipe says otherwise (config/methods.py)."""
    adaptive_ratio: Ratio = 0.5
    """r: L = r * L_adaptive + (1 - r) * L_fixed. 1 builds no auxiliary group, 0 runs no
    bipartite matching."""
    teacher_query_ratio: Share = 1.0
    """q: share of the teacher's queries, most confident first, in the auxiliary group."""
    matched_pair_ratio: Share = 1.0
    """m: share of adaptive pairs kept, most confident first."""
    matching_cost: MatchingCostConfig = MatchingCostConfig()
    prediction: PredictionConfig = PredictionConfig()
    self_attention: AttentionConfig = AttentionConfig()
    cross_attention: AttentionConfig = AttentionConfig()
    auxiliary_group: AuxiliaryGroupConfig = AuxiliaryGroupConfig()
    general_points: GeneralPointsConfig = GeneralPointsConfig()
    features: FeatureConfig = FeatureConfig()
    layer_map: Literal["uniform", "last"] | LayerList = "uniform"
    """Teacher layer for each student layer; a list names them, last must map to last."""
    warmup_steps: Annotated[int, Field(ge=0, le=MAXIMUM)] = 0
    """Distillation weights grow linearly from 0 over this many optimiser steps."""

    @model_validator(mode="before")
    @classmethod
    def _on_the_method(cls, settings: object) -> object:
        return with_method(settings) if isinstance(settings, Mapping) else settings

    @property
    def terms(self) -> tuple[float, float, float]:
        """Weights of the prediction, self- and cross-attention terms."""
        return self.prediction.weight, self.self_attention.weight, self.cross_attention.weight

    @property
    def distils(self) -> bool:
        """Whether any distillation term is on; the controls of the ablation have none."""
        return any(self.terms) or bool(self.features.weight)

    @property
    def has_auxiliary_group(self) -> bool:
        """Whether the teacher's queries run through the student's decoder."""
        wanted = self.adaptive_ratio < 1 or self.auxiliary_group.always
        return self.method != "none" and wanted

    @property
    def matches_adaptively(self) -> bool:
        """Whether bipartite matching between teacher and student runs."""
        return self.method != "none" and self.adaptive_ratio > 0 and any(self.terms)

    @property
    def without_effect(self) -> frozenset[str]:
        """Keys that the method or a ratio of 0 or 1 switches off; setting them is an error."""
        if self.method == "none":
            return frozenset(type(self).model_fields) - {"method"}
        if not self.has_auxiliary_group:
            return frozenset({"auxiliary_group", "teacher_query_ratio"})
        if self.adaptive_ratio == 0:
            return frozenset({"matching_cost", "matched_pair_ratio"})
        return frozenset()

    @model_validator(mode="after")
    def _every_setting_fires(self) -> Self:
        if self.method == "none":
            return self._plain_has_nothing_set()
        if not self.has_auxiliary_group:
            self._adaptive_only_is_whole()
        if self.auxiliary_group.always and not self.auxiliary_group.ground_truth:
            raise ValueError(
                "auxiliary_group.always without ground_truth: where adaptive_ratio is 1 the group "
                "would learn nothing"
            )
        supervised = self.auxiliary_group.ground_truth
        if self.has_auxiliary_group and not supervised and not any(self.terms):
            raise ValueError(
                "the auxiliary group would learn nothing: all term weights are 0 and "
                "auxiliary_group.ground_truth is false"
            )
        if self.general_points.count and not any(self.terms):
            raise ValueError("general_points have no effect: all term weights are 0")
        if (
            self.adaptive_ratio == 0
            and {"matching_cost", "matched_pair_ratio"} & self.model_fields_set
        ):
            raise ValueError(
                "adaptive_ratio 0 runs no bipartite matching: "
                "remove matching_cost and matched_pair_ratio"
            )
        if self.auxiliary_group.queries == "random" and self.has_auxiliary_group:
            self._random_queries_teach_nothing()
        return self

    def _plain_has_nothing_set(self) -> Self:
        extra = sorted(self.model_fields_set - {"method"})
        if extra:
            raise ValueError(f"method 'none' distils nothing: remove {', '.join(extra)}")
        return self

    def _adaptive_only_is_whole(self) -> None:
        if not self.distils:
            raise ValueError(
                "adaptive_ratio 1 with all term weights 0 trains nothing but the plain "
                "student: use method 'none'"
            )
        if {"auxiliary_group", "teacher_query_ratio"} & self.model_fields_set:
            raise ValueError(
                "adaptive_ratio 1 builds no auxiliary group: "
                "remove auxiliary_group and teacher_query_ratio"
            )

    def _random_queries_teach_nothing(self) -> None:
        if self.distils:
            raise ValueError(
                "random auxiliary queries have no teacher outputs to distil: "
                "set all term weights to 0, or auxiliary_group.queries to 'teacher'"
            )
        if self.general_points.count:
            raise ValueError("random auxiliary queries and general_points exclude each other")
        if self.auxiliary_group.assignment == "teacher":
            raise ValueError(
                "random auxiliary queries have no teacher assignment: "
                "set auxiliary_group.assignment to 'own'"
            )
