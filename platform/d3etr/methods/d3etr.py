"""D3ETR (arXiv 2211.09768): Adaptive and Fixed Matching, mixed; predictions and both attentions.

A DETR decoder's outputs are an unordered set: query 7 of the student has nothing to do with query 7
of the teacher. Adaptive Matching pairs them by minimal cost in every decoder layer; Fixed Matching
runs the teacher's queries through the student's decoder, where query i corresponds to query i.
Inherited Matching needs neither: a student whose queries and decoder began as the teacher's has
query i of the teacher as its query i.

The paper's: both matchings and their mixing, and that predictions, self- and cross-attention are
distilled over the pairs. Our choices, the paper's are not known: the costs, the form of each loss,
the ratio r and its default of 0.5, that the teacher's references come along. Inherited Matching is
ours.

Shapes: L decoder layers · B images · M teacher queries · P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor

from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import (
    FeatureConfig,
    GeneralPointsConfig,
    MatchingCostConfig,
    Ratio,
    Share,
)
from d3etr.matching.assignment import CostBlock
from d3etr.methods.base import Matches, StudentOutputs, TeacherOutputs
from d3etr.methods.denoising_points import DenoisingPointsConfig
from d3etr.methods.encoder_selection import SelectionConfig
from d3etr.methods.inherited import PlaceMatching
from d3etr.methods.teacher_queries import TeacherQueryMethod
from d3etr.methods.teacher_query_config import TeacherQueryConfig
from d3etr.structures import MAIN, Targets


class D3ETRConfig(TeacherQueryConfig):
    """D3ETR: matching ratios, costs, loss terms."""

    method: Literal["d3etr"] = "d3etr"
    inherited_ratio: Ratio = 0.0
    """i: L = i * L_inherited + (1 - i) * (r * L_adaptive + (1 - r) * L_fixed). L_inherited pairs
    each query with the teacher's query that it began as: ``student.initialise_from`` takes decoder
    and queries of the teacher. 1 builds no auxiliary group and runs no bipartite matching, but for
    two-stage detectors: their queries of one place are paired, the rest by cost."""
    adaptive_ratio: Ratio = 0.5
    """r: L = r * L_adaptive + (1 - r) * L_fixed. 1 builds no auxiliary group, 0 runs no
    bipartite matching."""
    matched_pair_ratio: Share = 1.0
    """m: share of adaptive pairs kept, most confident first."""
    matching_cost: MatchingCostConfig = MatchingCostConfig()
    general_points: GeneralPointsConfig = GeneralPointsConfig()
    """KD-DETR's points on top; not D3ETR's."""
    denoising_points: DenoisingPointsConfig = DenoisingPointsConfig()
    """Denoising queries as pairs on top; not D3ETR's."""
    selection: SelectionConfig = SelectionConfig()
    """The encoder's class scores on top; not D3ETR's."""
    features: FeatureConfig = FeatureConfig()
    """DETRDistill's features on top; not D3ETR's."""

    @property
    def has_auxiliary_group(self) -> bool:
        """Whether the teacher's queries run through the student's decoder."""
        return self.fixed_share > 0 or self.auxiliary_group.always

    @property
    def matches_adaptively(self) -> bool:
        """Whether bipartite matching between teacher and student runs."""
        return self._mixes_adaptive and self.compares_pairs

    @property
    def fixed_share(self) -> float:
        """(1 - i) (1 - r)."""
        return (1 - self.inherited_ratio) * (1 - self.adaptive_ratio)

    @property
    def inherited_share(self) -> float:
        """The ratio i."""
        return self.inherited_ratio

    @property
    def description(self) -> str:
        """The terms over pairs, and how both kinds of pairs are mixed."""
        terms = [super().description]
        if self.inherited_ratio > 0:
            terms.append(f"inherited ratio {self.inherited_ratio:g}")
        if self.inherited_ratio < 1:
            terms.append(f"adaptive ratio {self.adaptive_ratio:g}")
        return ", ".join(terms)

    @property
    def without_effect(self) -> frozenset[str]:
        """Keys that a ratio of 0 or 1 switches off; setting them is an error."""
        return frozenset(self._switched_off)

    @property
    def _switched_off(self) -> dict[str, str]:
        """Key without effect -> the ratio that switches it off, and how."""
        off: dict[str, str] = {}
        if self.inherited_ratio == 1:
            off["adaptive_ratio"] = "inherited_ratio 1 leaves nothing to mix"
        if not self.has_auxiliary_group:
            reason = f"{self._whole_ratio} 1 builds no auxiliary group"
            off |= dict.fromkeys(("auxiliary_group", "teacher_query_ratio"), reason)
        if not self._mixes_adaptive:
            ratio = "inherited_ratio 1" if self.inherited_ratio == 1 else "adaptive_ratio 0"
            reason = f"{ratio} runs no bipartite matching"
            off |= dict.fromkeys(("matching_cost", "matched_pair_ratio"), reason)
        return off

    @property
    def _mixes_adaptive(self) -> bool:
        """Whether (1 - i) r is above 0."""
        return self.inherited_ratio < 1 and self.adaptive_ratio > 0

    @property
    def _whole_ratio(self) -> str:
        """Which ratio is 1 where there is no auxiliary group."""
        return "inherited_ratio" if self.inherited_ratio == 1 else "adaptive_ratio"

    @model_validator(mode="after")
    def _every_setting_fires(self) -> Self:
        if not self.has_auxiliary_group and not self.distils:
            raise ValueError(
                f"{self._whole_ratio} 1 with all term weights 0 trains nothing but the plain "
                "student: use method 'none'"
            )
        for key, reason in self._switched_off.items():
            if key in self.model_fields_set:
                raise ValueError(f"{reason}: remove {key}")
        if self.inherited_ratio and not self.compares_pairs:
            raise ValueError("inherited_ratio has no effect: all term weights are 0")
        if self.auxiliary_group.always and not self.auxiliary_group.ground_truth:
            raise ValueError(
                "auxiliary_group.always without ground_truth: where adaptive_ratio is 1 the group "
                "would learn nothing"
            )
        if self.general_points.count and not self.compares_pairs:
            raise ValueError("general_points have no effect: all term weights are 0")
        return self

    def random_group_problem(self) -> str | None:
        """Why random queries in the auxiliary group contradict the rest, or None."""
        if self.auxiliary_group.queries == "random" and self.general_points.count:
            return "random auxiliary queries and general_points exclude each other"
        return super().random_group_problem()


class D3ETR(TeacherQueryMethod):
    """L = L_det(main) + L_det(auxiliary) + i L_inherited + (1 - i) L_mixed.

    L_mixed = r L_adaptive + (1 - r) L_fixed, the paper's; i is 0 by default.

    L_det is the set criterion, over the student's assignment for the main group and over the
    teacher's for the auxiliary one; the groups say so (``student_groups``). Each other L is
    w_pred L_pred + w_self L_self + w_cross L_cross over its pairs (``pair_losses``).
    """

    config: D3ETRConfig
    config_class = D3ETRConfig

    def __init__(
        self, config: D3ETRConfig, student: DetectorConfig, teacher: DetectorConfig, *, seed: int
    ) -> None:
        super().__init__(config, student, teacher, seed=seed)
        self.places: PlaceMatching | None = None
        if config.inherited_share and student.queries_need_images:
            self.places = PlaceMatching(
                config.matching_cost, 1.0, student.queries, config.minimum_confidence
            )

    @property
    def compared_groups(self) -> tuple[str, ...]:
        """The student's own queries too, where they began as the teacher's."""
        by_number = self.config.inherited_share and self.places is None
        return (*super().compared_groups, *[MAIN] * bool(by_number))

    def costs(
        self, student: StudentOutputs, teacher: TeacherOutputs, targets: Targets
    ) -> dict[str, CostBlock]:
        """Adaptive Matching, and that of a two-stage detector's places."""
        problems = super().costs(student, teacher, targets)
        if self.places is not None:
            problems[self.places.name] = self.places.problem_of_places(student, teacher)
        return problems

    def confidences(self, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """[L] confidence of the teacher, summed over the pairs of each kind."""
        sums = super().confidences(teacher)
        if self.places is not None:
            sums[self.places.name] = self.places.confidence(teacher.main)
        return sums

    def losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        matches: Matches,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """L_inherited, L_adaptive and L_fixed, mixed, and what is added on top."""
        if not (teacher.groups and self.config.distils):
            return {}
        i, r = self.config.inherited_ratio, self.config.adaptive_ratio
        without_matching = (
            self.fixed_losses(self.config.fixed_share, student, teacher, normalisers)
            | self.general_losses(student, teacher, normalisers)
            | self.added_losses(student, teacher, targets, normalisers)
            | self.feature_losses(student, teacher, targets, normalisers)
        )
        both = student, teacher
        if self.places is None:
            without_matching |= self.fixed_losses(i, *both, normalisers, MAIN)
        adaptive = self.matched_losses((1 - i) * r, *both, matches, normalisers)
        if self.places is not None:
            adaptive |= self.matched_losses(i, *both, matches, normalisers, self.places)
        return adaptive | without_matching
