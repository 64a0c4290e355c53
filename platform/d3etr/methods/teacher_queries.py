"""Methods that run the teacher's queries through the student's decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from d3etr.config.base import MAXIMUM
from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import (
    AttentionConfig,
    AuxiliaryGroupConfig,
    FeatureConfig,
    GeneralPointsConfig,
    LayerList,
    MethodConfig,
    PredictionConfig,
    Share,
)
from d3etr.losses.features import FeatureComparison
from d3etr.methods.adapters import GeneralPoints, RandomQueries, TeacherQueries
from d3etr.methods.base import Method, StudentOutputs, TeacherGroup, TeacherOutputs
from d3etr.methods.correspondence import FIXED
from d3etr.methods.layer_map import teacher_layers
from d3etr.methods.pairs import MatchedPairs, compares_anything, compares_attention
from d3etr.methods.selection import select_teacher_queries
from d3etr.structures import DecoderOutputs, ObjectQueries, QueryGroup, Supervision, Targets

AUXILIARY, GENERAL = "auxiliary", "general"
"""Names of the groups: the teacher's queries, and general points."""


class TeacherQueryConfig(MethodConfig):
    """What such methods share: the group, what is compared over pairs, layers, warm-up."""

    teacher_query_ratio: Share = 1.0
    """q: share of the teacher's queries, most confident first, in the auxiliary group."""
    prediction: PredictionConfig = PredictionConfig()
    self_attention: AttentionConfig = AttentionConfig()
    cross_attention: AttentionConfig = AttentionConfig()
    auxiliary_group: AuxiliaryGroupConfig = AuxiliaryGroupConfig()
    layer_map: Literal["uniform", "last"] | LayerList = "uniform"
    """Teacher layer for each student layer; a list names them, last must map to last."""
    warmup_steps: Annotated[int, Field(ge=0, le=MAXIMUM)] = 0
    """Distillation weights grow linearly from 0 over this many optimiser steps."""

    @property
    def warmup(self) -> int:
        """Optimiser steps of the warm-up."""
        return self.warmup_steps

    @property
    def has_auxiliary_group(self) -> bool:
        """Whether the teacher's queries run through the student's decoder."""
        return True

    @property
    def distils(self) -> bool:
        """Whether anything of the teacher's outputs is compared with."""
        return compares_anything(self)

    @property
    def description(self) -> str:
        """The terms over pairs with their weights."""
        terms = {
            "predictions": self.prediction.weight,
            "self-attention": self.self_attention.weight,
            "cross-attention": self.cross_attention.weight,
        }
        shown = [f"{name} ({weight:g})" for name, weight in terms.items() if weight]
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
    def _the_group_learns(self) -> Self:
        if (
            self.has_auxiliary_group
            and not self.auxiliary_group.ground_truth
            and not compares_anything(self)
        ):
            raise ValueError(
                "the auxiliary group would learn nothing: all term weights are 0 and "
                "auxiliary_group.ground_truth is false"
            )
        if problem := self.random_group_problem():
            raise ValueError(problem)
        return self


class TeacherQueryMethod(Method):
    """The auxiliary group and general points; subclasses say what is compared over them.

    Args:
        config: of the method.
        student: the student's architecture.
        teacher: the teacher's.
        seed: of random queries and points.
        points: of general points, for methods that draw some.
        features: of the comparison of memories, for methods that have it.
    """

    def __init__(
        self,
        config: TeacherQueryConfig,
        student: DetectorConfig,
        teacher: DetectorConfig,
        *,
        seed: int,
        points: GeneralPointsConfig | None = None,
        features: FeatureConfig | None = None,
    ) -> None:
        super().__init__()
        self.features: FeatureComparison | None = None
        if features is not None and features.weight:
            self.features = FeatureComparison(student.width, teacher.width, features.queries)
            self.needs_features = True
        self._groups = config
        self.layers = teacher_layers(
            config.layer_map, student.decoder_layers, teacher.decoder_layers
        )
        count = 0 if points is None else points.count
        self._points = GeneralPoints(count, seed) if count else None
        self.draws_in_steps = self._points is not None
        random = config.auxiliary_group.queries == "random"
        self.auxiliary: nn.Module | None = None
        if random and config.has_auxiliary_group:
            self.auxiliary = RandomQueries(teacher, student, config.teacher_query_ratio, seed)
        elif config.has_auxiliary_group or self.draws_in_steps:
            self.auxiliary = TeacherQueries(teacher, student)
        chosen = config.teacher_query_ratio < 1 or teacher.queries_need_images
        self.groups_need_images = chosen or self.draws_in_steps
        self.needs_attention = compares_attention(config)
        self.needs_teacher_outputs = not random and (
            config.distils or self._teacher_assigns or chosen
        )

    @property
    def _teacher_assigns(self) -> bool:
        """Whether the teacher's assignment supervises the auxiliary group."""
        group = self._groups.auxiliary_group
        supervised = self._groups.has_auxiliary_group and group.ground_truth
        return supervised and group.assignment == "teacher"

    def teacher_groups(self, queries: ObjectQueries, step: int) -> dict[str, ObjectQueries]:
        """General points, drawn like the teacher's queries."""
        return {} if self._points is None else {GENERAL: self._points.draw(queries, step)}

    def select(self, teacher: TeacherOutputs) -> TeacherOutputs:
        """The share of the teacher's queries that forms the auxiliary group."""
        if not self._groups.has_auxiliary_group:
            return teacher
        assert teacher.queries is not None
        ratio = self._groups.teacher_query_ratio
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
        if self._groups.has_auxiliary_group:
            groups[AUXILIARY] = self._auxiliary_group(self.auxiliary, teacher)
        if GENERAL in teacher.groups:
            points = self.auxiliary(teacher.groups[GENERAL].queries)
            groups[GENERAL] = QueryGroup(points, Supervision.NONE)
        return groups

    def _auxiliary_group(self, adapter: nn.Module, teacher: TeacherOutputs) -> QueryGroup:
        config, selected = self._groups.auxiliary_group, teacher.groups.get(AUXILIARY)
        chosen = self.groups_need_images and selected is not None
        queries = adapter(selected.queries if chosen and selected else teacher.queries)
        if not config.ground_truth:
            return QueryGroup(queries, Supervision.NONE)
        if not self._teacher_assigns or selected is None:
            return QueryGroup(queries)
        return QueryGroup(queries, Supervision.TEACHER, selected.outputs)


def confidence_of(outputs: DecoderOutputs) -> Tensor:
    """[L] the teacher's confidence summed over images and queries."""
    return outputs.confidence().float().sum((1, 2))


def fixed_pairs(
    group: str,
    student: StudentOutputs,
    teacher: TeacherOutputs,
    normalisers: Mapping[str, Tensor],
    normaliser: str,
) -> MatchedPairs:
    """Pairs that hold by construction: query i of a group is the same query in both models.

    Args:
        group: its name on both sides.
        student: outputs of the student.
        teacher: outputs of the teacher.
        normalisers: of the global batch.
        normaliser: name of the group's confidence in there.
    """
    return MatchedPairs(
        student.groups[group],
        teacher.groups[group].outputs,
        FIXED,
        normalisers[normaliser],
        normalisers["images"],
    )
