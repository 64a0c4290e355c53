"""D3ETR (arXiv 2211.09768): Adaptive and Fixed Matching, mixed; predictions and both attentions.

A DETR decoder's outputs are an unordered set: query 7 of the student has nothing to do with query 7
of the teacher. Adaptive Matching pairs them by minimal cost in every decoder layer; Fixed Matching
runs the teacher's queries through the student's decoder, where query i corresponds to query i.

The paper's: both matchings and their mixing, and that predictions, self- and cross-attention are
distilled over the pairs. Our choices, the paper's are not known: the costs, the form of each loss,
the ratio r and its default of 0.5, and that the teacher's references come along.

Shapes: L decoder layers · B images · M teacher queries · P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor

from d3etr.config.distillation import (
    FeatureConfig,
    GeneralPointsConfig,
    MatchingCostConfig,
    Ratio,
    Share,
)
from d3etr.methods.base import Matches, StudentOutputs, TeacherOutputs
from d3etr.methods.teacher_queries import TeacherQueryConfig, TeacherQueryMethod
from d3etr.structures import Targets


class D3ETRConfig(TeacherQueryConfig):
    """D3ETR: matching ratios, costs, loss terms."""

    method: Literal["d3etr"] = "d3etr"
    adaptive_ratio: Ratio = 0.5
    """r: L = r * L_adaptive + (1 - r) * L_fixed. 1 builds no auxiliary group, 0 runs no
    bipartite matching."""
    matched_pair_ratio: Share = 1.0
    """m: share of adaptive pairs kept, most confident first."""
    matching_cost: MatchingCostConfig = MatchingCostConfig()
    general_points: GeneralPointsConfig = GeneralPointsConfig()
    """KD-DETR's points on top; not D3ETR's."""
    features: FeatureConfig = FeatureConfig()
    """DETRDistill's features on top; not D3ETR's."""

    @property
    def has_auxiliary_group(self) -> bool:
        """Whether the teacher's queries run through the student's decoder."""
        return self.adaptive_ratio < 1 or self.auxiliary_group.always

    @property
    def matches_adaptively(self) -> bool:
        """Whether bipartite matching between teacher and student runs."""
        return self.adaptive_ratio > 0 and self.compares_pairs

    @property
    def fixed_share(self) -> float:
        """1 - r."""
        return 1 - self.adaptive_ratio

    @property
    def description(self) -> str:
        """The terms over pairs, and how both kinds of pairs are mixed."""
        return f"{super().description}, adaptive ratio {self.adaptive_ratio:g}"

    @property
    def without_effect(self) -> frozenset[str]:
        """Keys that a ratio of 0 or 1 switches off; setting them is an error."""
        if not self.has_auxiliary_group:
            return frozenset({"auxiliary_group", "teacher_query_ratio"})
        if self.adaptive_ratio == 0:
            return frozenset({"matching_cost", "matched_pair_ratio"})
        return frozenset()

    @model_validator(mode="after")
    def _every_setting_fires(self) -> Self:
        if not self.has_auxiliary_group and not self.distils:
            raise ValueError(
                "adaptive_ratio 1 with all term weights 0 trains nothing but the plain "
                "student: use method 'none'"
            )
        if not self.has_auxiliary_group and self.without_effect & self.model_fields_set:
            raise ValueError(
                "adaptive_ratio 1 builds no auxiliary group: "
                "remove auxiliary_group and teacher_query_ratio"
            )
        if self.auxiliary_group.always and not self.auxiliary_group.ground_truth:
            raise ValueError(
                "auxiliary_group.always without ground_truth: where adaptive_ratio is 1 the group "
                "would learn nothing"
            )
        if self.general_points.count and not self.compares_pairs:
            raise ValueError("general_points have no effect: all term weights are 0")
        if self.adaptive_ratio == 0 and self.without_effect & self.model_fields_set:
            raise ValueError(
                "adaptive_ratio 0 runs no bipartite matching: "
                "remove matching_cost and matched_pair_ratio"
            )
        return self

    def random_group_problem(self) -> str | None:
        """Why random queries in the auxiliary group contradict the rest, or None."""
        if self.auxiliary_group.queries == "random" and self.general_points.count:
            return "random auxiliary queries and general_points exclude each other"
        return super().random_group_problem()


class D3ETR(TeacherQueryMethod):
    """L = L_det(main) + L_det(auxiliary) + r L_adaptive + (1 - r) L_fixed.

    L_det is the set criterion, over the student's assignment for the main group and over the
    teacher's for the auxiliary one; the groups say so (``student_groups``). Each other L is
    w_pred L_pred + w_self L_self + w_cross L_cross over its pairs (``pair_losses``).
    """

    config: D3ETRConfig
    config_class = D3ETRConfig

    def losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        matches: Matches,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """R L_adaptive + (1 - r) L_fixed, and what is added on top."""
        if not (teacher.groups and self.config.distils):
            return {}
        r = self.config.adaptive_ratio
        without_matching = (
            self.fixed_losses(1 - r, student, teacher, normalisers)
            | self.general_losses(student, teacher, normalisers)
            | self.feature_losses(student, teacher, targets, normalisers)
        )
        return self.matched_losses(r, student, teacher, matches, normalisers) | without_matching
