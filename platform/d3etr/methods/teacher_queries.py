"""Methods that run the teacher's queries through the student's decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import (
    MatchingCostConfig,
    MethodConfig,
)
from d3etr.matching.assignment import CostBlock
from d3etr.methods.adapters import GeneralPoints, RandomQueries, TeacherQueries
from d3etr.methods.adaptive import AdaptiveMatching
from d3etr.methods.added_terms import AddingMethod
from d3etr.methods.base import (
    Matches,
    StudentOutputs,
    TeacherGroup,
    TeacherOutputs,
)
from d3etr.methods.compatibility import check_pair
from d3etr.methods.pairs import (
    FIXED,
    Correspondence,
    MatchedPairs,
    counted_confidence,
    pair_losses,
)
from d3etr.methods.refinement import TeacherRefinement
from d3etr.methods.selection import select_teacher_queries
from d3etr.methods.teacher_query_config import TeacherQueryConfig
from d3etr.structures import MAIN, ObjectQueries, QueryGroup, Supervision, Targets

AUXILIARY, GENERAL = "auxiliary", "general"
"""Names of the groups: the teacher's queries, and general points."""
_NAMES = {AUXILIARY: "fixed", MAIN: "inherited"}
"""What losses over the pairs of a group are called, where not as the group."""


class TeacherQueryMethod(AddingMethod):
    """The auxiliary group, general points and matched pairs; subclasses say what is added up.

    Args:
        config: of the method; what it has no section for is not built.
        student: the student's architecture.
        teacher: the teacher's.
        seed: of random queries and points.
    """

    def __init__(
        self,
        config: TeacherQueryConfig,
        student: DetectorConfig,
        teacher: DetectorConfig,
        *,
        seed: int,
    ) -> None:
        super().__init__(config, student, teacher)
        cost: MatchingCostConfig | None = getattr(config, "matching_cost", None)
        if cost is not None:
            self.adaptive = AdaptiveMatching(
                cost, config.kept_share, student.queries, config.minimum_confidence
            )
        self.refinement = TeacherRefinement(self.layers) if config.refine_teacher else None
        points = config.points
        self._points = GeneralPoints.of(teacher, points.count, seed) if points else None
        self.draws_in_steps = self._points is not None
        random = config.auxiliary_group.queries == "random"
        self.auxiliary: nn.Module | None = None
        if random and config.has_auxiliary_group:
            self.auxiliary = RandomQueries(teacher, student, config.teacher_query_ratio, seed)
        elif config.has_auxiliary_group or self.draws_in_steps:
            self.auxiliary = TeacherQueries(teacher, student, config.auxiliary_group.content)
        chosen = config.teacher_query_ratio < 1 or teacher.queries_need_images
        self.groups_need_images = chosen or self.draws_in_steps
        self.needs_attention = config.compares_attention
        outputs_count = config.distils or self._teacher_assigns or chosen
        self.needs_teacher_outputs = outputs_count and not random

    @property
    def compared_groups(self) -> tuple[str, ...]:
        """Groups whose query i is query i of the teacher's group of the same name."""
        return (AUXILIARY, GENERAL)

    @classmethod
    def check_compatible(
        cls, config: MethodConfig, student: DetectorConfig, teacher: DetectorConfig, classes: int
    ) -> None:
        """Refuse detectors that the terms cannot bridge; see ``Method.check_compatible``."""
        assert isinstance(config, TeacherQueryConfig)
        check_pair(config, student, teacher, classes)

    @property
    def _teacher_assigns(self) -> bool:
        """Whether the teacher's assignment supervises the auxiliary group."""
        group, there = self.config.auxiliary_group, self.config.has_auxiliary_group
        return there and group.ground_truth and group.assignment == "teacher"

    def teacher_groups(
        self, queries: ObjectQueries, targets: Targets | None, step: int
    ) -> dict[str, ObjectQueries]:
        """General points, drawn like the teacher's queries."""
        return {} if self._points is None else {GENERAL: self._points.draw(queries, step)}

    def select(self, teacher: TeacherOutputs) -> TeacherOutputs:
        """The share of the teacher's queries that forms the auxiliary group."""
        if not self.config.has_auxiliary_group:
            return teacher
        assert teacher.queries is not None
        ratio = self.config.teacher_query_ratio
        outputs, queries = select_teacher_queries(teacher.main, teacher.queries, ratio)
        return replace(
            teacher, groups={**teacher.groups, AUXILIARY: TeacherGroup(queries, outputs)}
        )

    def student_groups(
        self, teacher: TeacherOutputs, targets: Targets, step: int
    ) -> dict[str, QueryGroup]:
        """The auxiliary group, and the general points that the teacher decoded."""
        groups: dict[str, QueryGroup] = {}
        if self.auxiliary is None:
            return groups
        if self.config.has_auxiliary_group:
            groups[AUXILIARY] = self._auxiliary_group(self.auxiliary, teacher)
        if GENERAL in teacher.groups:
            points = self.auxiliary(teacher.groups[GENERAL].queries)
            groups[GENERAL] = QueryGroup(points, Supervision.NONE)
        return groups

    def _auxiliary_group(self, adapter: nn.Module, teacher: TeacherOutputs) -> QueryGroup:
        config, selected = self.config.auxiliary_group, teacher.groups.get(AUXILIARY)
        chosen = self.groups_need_images and selected is not None
        queries = adapter(selected.queries if chosen and selected else teacher.queries)
        if not config.ground_truth:
            return QueryGroup(queries, Supervision.NONE)
        if not self._teacher_assigns or selected is None:
            return QueryGroup(queries)
        return QueryGroup(queries, Supervision.TEACHER, selected.outputs)

    def costs(
        self, student: StudentOutputs, teacher: TeacherOutputs, targets: Targets
    ) -> dict[str, CostBlock]:
        """Adaptive Matching: all of the student's queries against all of the teacher's."""
        if self.adaptive is None or not (self.config.matches_adaptively and teacher.groups):
            return {}
        return {"adaptive": self.adaptive.problem(student.main, teacher.main)}

    def normalisers(self, teacher: TeacherOutputs, targets: Targets) -> dict[str, Tensor]:
        """[L] what pairs of each kind are divided by: confidence of the teacher, or objects."""
        sums = self.confidences(teacher)
        if self.config.normaliser == "objects":
            objects = targets.num_objects.sum().float()
            sums = {name: objects.expand_as(total) for name, total in sums.items()}
        return sums | self.added_normalisers(teacher, targets)

    def confidences(self, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """[L] confidence of the teacher, summed over the pairs of each kind."""
        least, groups = self.config.minimum_confidence, teacher.groups
        found = {name: groups[name].outputs for name in self.compared_groups if name in groups}
        sums = {name: counted_confidence(x, least).sum((1, 2)) for name, x in found.items()}
        if self.adaptive is not None and teacher.groups:
            sums["adaptive"] = self.adaptive.confidence(teacher.main)
        return sums

    def matched_losses(
        self,
        weight: float,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        matches: Matches,
        normalisers: Mapping[str, Tensor],
        matching: AdaptiveMatching | None = None,
    ) -> dict[str, Tensor]:
        """``weight`` L_adaptive: over pairs of minimal cost; to be called last.

        ``matching`` is what posed their problem, Adaptive Matching unless given.
        """
        matching = self.adaptive if matching is None else matching
        if matching is None or not weight or not self.config.compares_pairs:
            return {}
        with matches(matching.name) as assignment:
            pairs = matching.pairs(assignment, student.main, teacher.main, normalisers)
            return assignment.nan_if_invalid(self.pair_terms(matching.name, weight, pairs))

    def pair_terms(self, name: str, weight: float, pairs: MatchedPairs) -> dict[str, Tensor]:
        """All that is compared over pairs, named ``NAME/..`` and times ``weight``."""
        return pair_losses(name, weight, pairs, self.config, self.levels)

    def fixed_losses(
        self,
        weight: float,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        normalisers: Mapping[str, Tensor],
        group: str = AUXILIARY,
    ) -> dict[str, Tensor]:
        """``weight`` L_fixed, L_inherited, ..: query i of a group is the same query in both."""
        if group not in teacher.groups or not weight:
            return {}
        ours, theirs = student.groups[group], teacher.groups[group]
        index = FIXED
        if theirs.kept is not None:  # of the student's queries those with the same numbers
            index = Correspondence(student=theirs.kept.expand(ours.layers, -1, -1))
        pairs = MatchedPairs(ours, theirs.outputs, index, normalisers[group], normalisers["images"])
        return self.pair_terms(_NAMES.get(group, group), weight, pairs)

    def general_losses(
        self, student: StudentOutputs, teacher: TeacherOutputs, normalisers: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """W L_general: over general points."""
        weight = self.config.points.weight if self.config.points else 0.0
        return self.fixed_losses(weight, student, teacher, normalisers, GENERAL)
