"""DETRDistill (arXiv 2211.10156): matched logits, target-aware features, the teacher's assignment.

The teacher's queries are a group that learns from ground truth by the teacher's assignment
(weights: the authors' code). That memory tokens behind the encoder are compared is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal, Self

from pydantic import model_validator
from torch import Tensor

from d3etr.config.distillation import (
    AttentionConfig,
    AuxiliaryGroupConfig,
    CrossAttentionConfig,
    FeatureConfig,
    GeneralPointsConfig,
    MatchingCostConfig,
    PredictionConfig,
    Share,
)
from d3etr.methods.base import Matches, StudentOutputs, TeacherOutputs
from d3etr.methods.teacher_queries import TeacherQueryMethod
from d3etr.methods.teacher_query_config import TeacherQueryConfig
from d3etr.structures import Targets


class DETRDistillConfig(TeacherQueryConfig):
    """DETRDistill: costs and loss terms."""

    implied: ClassVar[Mapping[str, object]] = MappingProxyType(
        {
            "adaptive_ratio": 1.0,
            "general_points": GeneralPointsConfig().model_dump(mode="json"),
        }
    )

    method: Literal["detrdistill"] = "detrdistill"
    matched_pair_ratio: Share = 1.0
    """Share of matched pairs kept, most confident first."""
    matching_cost: MatchingCostConfig = MatchingCostConfig(class_distance="bce", class_cost=1.0)
    prediction: PredictionConfig = PredictionConfig(
        weight=1.0,
        class_loss="bce",
        class_weight=1.0,
        pair_weights="uniform",
        class_pair_weights="uniform",
    )
    self_attention: AttentionConfig = AttentionConfig(weight=0.0)
    """Not DETRDistill's."""
    cross_attention: CrossAttentionConfig = CrossAttentionConfig(weight=0.0)
    """Not DETRDistill's."""
    auxiliary_group: AuxiliaryGroupConfig = AuxiliaryGroupConfig(always=True)
    features: FeatureConfig = FeatureConfig(weight=1.0)

    @property
    def has_auxiliary_group(self) -> bool:
        """Whether the teacher's queries run through the student's decoder."""
        return self.auxiliary_group.always

    @property
    def matches_adaptively(self) -> bool:
        """Whether bipartite matching between teacher and student runs."""
        return self.compares_pairs

    @property
    def fixed_share(self) -> float:
        """Nothing is compared over the group."""
        return 0.0

    @property
    def without_effect(self) -> frozenset[str]:
        """Keys that have no effect without the group."""
        return frozenset() if self.has_auxiliary_group else frozenset({"teacher_query_ratio"})

    @model_validator(mode="after")
    def _every_setting_fires(self) -> Self:
        if not self.has_auxiliary_group and not self.distils:
            raise ValueError(
                "all term weights are 0 and auxiliary_group.always is false: use method 'none'"
            )
        if self.has_auxiliary_group and not self.auxiliary_group.ground_truth:
            raise ValueError(
                "auxiliary_group.ground_truth is false: the group, over which nothing is "
                "distilled, would learn nothing; set auxiliary_group.always to false"
            )
        if not self.has_auxiliary_group and "teacher_query_ratio" in self.model_fields_set:
            raise ValueError("teacher_query_ratio has no effect: auxiliary_group.always is false")
        return self


class DETRDistill(TeacherQueryMethod):
    """L = L_det(main) + L_det(auxiliary, teacher's assignment) + L_matched + w L_features.

    L_matched is class and box losses over pairs of minimal cost (``pair_losses``), named
    ``adaptive``.
    """

    config_class = DETRDistillConfig

    def losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        matches: Matches,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """L_matched + w L_features."""
        features = self.feature_losses(student, teacher, targets, normalisers)
        return self.matched_losses(1.0, student, teacher, matches, normalisers) | features
