"""Methods that run the teacher's queries through the student's decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import (
    AttentionConfig,
    AuxiliaryGroupConfig,
    CrossAttentionConfig,
    FeatureConfig,
    GeneralPointsConfig,
    LayerList,
    MatchingCostConfig,
    MethodConfig,
    PredictionConfig,
    PredictionMethodConfig,
    Ratio,
    Share,
)
from d3etr.losses.features import FeatureComparison
from d3etr.matching.assignment import CostBlock
from d3etr.methods.adapters import GeneralPoints, RandomQueries, TeacherQueries
from d3etr.methods.adaptive import AdaptiveMatching
from d3etr.methods.base import Matches, Method, StudentOutputs, TeacherGroup, TeacherOutputs
from d3etr.methods.compatibility import check_pair, shared_levels
from d3etr.methods.pairs import (
    FIXED,
    Correspondence,
    MatchedPairs,
    counted_confidence,
    pair_losses,
)
from d3etr.methods.refinement import TeacherRefinement
from d3etr.methods.selection import select_teacher_queries, teacher_layers
from d3etr.structures import MAIN, ObjectQueries, QueryGroup, Supervision, Targets

AUXILIARY, GENERAL = "auxiliary", "general"
"""Names of the groups: the teacher's queries, and general points."""
_NAMES = {AUXILIARY: "fixed", MAIN: "inherited"}
"""What losses over the pairs of a group are called, where not as the group."""


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
        return self.compares_pairs or self.compared_features is not None

    @property
    def learns_without_labels(self) -> bool:
        """Features are weighed by the overlap of the teacher's boxes with objects: pairs alone."""
        return self.compares_pairs and self.normaliser == "confidence"

    @property
    def description(self) -> str:
        """The terms over pairs with their weights."""
        terms = {
            "predictions": self.prediction.weight,
            "self-attention": self.self_attention.weight,
            "cross-attention": self.cross_attention.weight,
        }
        shown = [f"{name} ({weight:g})" for name, weight in terms.items() if weight]
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
    def _confidence_counts(self) -> Self:
        if not self.counts_confidence and self.kinds_of_pair_weights <= {"uniform"}:
            raise ValueError(
                "minimum_confidence and normaliser have no effect: no term weights its pairs by "
                "confidence"
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


class TeacherQueryMethod(Method):
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
        super().__init__()
        self.features: FeatureComparison | None = None
        if (compared := config.compared_features) is not None:
            self.features = FeatureComparison(student.width, teacher.width, compared.queries)
            self.needs_features = True
        cost: MatchingCostConfig | None = getattr(config, "matching_cost", None)
        if cost is not None:
            self.adaptive = AdaptiveMatching(
                cost, config.kept_share, student.queries, config.minimum_confidence
            )
        self.config = config
        depths = student.decoder_layers, teacher.decoder_layers
        self.layers = teacher_layers(config.layer_map, *depths)
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
        self.levels = shared_levels(student, teacher) if config.cross_attention.weight else None
        self.needs_keys = config.cross_attention.detach_queries
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
        if self.config.normaliser == "confidence":
            return sums
        objects = targets.num_objects.sum().float()
        return {name: objects.expand_as(total) for name, total in sums.items()}

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

    def feature_losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """W L_features: over memory tokens."""
        config = self.config.compared_features
        if self.features is None or config is None:
            return {}
        assert teacher.memory is not None
        tokens, images = teacher.memory.tokens, normalisers["labelled_images"]
        distance = self.features(student.memory, teacher.main, tokens, targets, images)
        return {"features": config.weight * distance}
