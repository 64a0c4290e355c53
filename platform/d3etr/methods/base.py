"""What a distillation method is: query groups, costs, normalisers and losses.

A method is one file with a class of this kind and its configuration. ``Distiller`` runs detectors
and solvers and knows no term by name.

Shapes: B images · L student decoder layers · N queries of a group · M teacher queries ·
D' width of the teacher.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import MethodConfig
from d3etr.detectors.denoising import DenoisingConfig
from d3etr.matching.assignment import Assignment, CostBlock
from d3etr.methods.adaptive import AdaptiveMatching
from d3etr.methods.refinement import TeacherRefinement
from d3etr.structures import MAIN, DecoderOutputs, Memory, ObjectQueries, QueryGroup, Targets


@dataclass(frozen=True)
class TeacherGroup:
    """One query group of the teacher, outside the autograd graph.

    Attributes:
        queries: [M, ..] or [B, M, ..], of the teacher's width.
        outputs: of its decoder, one teacher layer per student layer.
        kept: [B, M] which of the teacher's own queries these are; None: all, in order, or others.
    """

    queries: ObjectQueries
    outputs: DecoderOutputs
    kept: Tensor | None = None


@dataclass(frozen=True)
class TeacherOutputs:
    """The teacher's side of one batch, outside the autograd graph.

    Attributes:
        queries: the teacher's own, with its width; None where they are each image's own and the
            teacher did not run.
        groups: what was decoded, by name: ``detection`` are its own queries, others are those of
            the method. Empty where the method needs no more of a teacher than its queries.
        memory: its encoder output; None unless the method compares features or token scores.
        stream: of a GPU, where all this is being computed; None for the current one.
    """

    queries: ObjectQueries | None
    groups: Mapping[str, TeacherGroup] = field(default_factory=dict)
    memory: Memory | None = None
    stream: torch.cuda.Stream | None = None

    @property
    def main(self) -> DecoderOutputs:
        """Outputs of the teacher's own queries."""
        return self.groups[MAIN].outputs

    def wait(self) -> None:
        """Let the device's current work wait for the teacher's; the host does not wait."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


@dataclass(frozen=True)
class StudentOutputs:
    """The student's side of one batch.

    Attributes:
        memory: its encoder output.
        groups: outputs of each query group by name; ``detection`` is the main one.
        place: [B, N] of its own queries, as of ``ObjectQueries``.
    """

    memory: Memory
    groups: Mapping[str, DecoderOutputs]
    place: Tensor | None = None

    @property
    def main(self) -> DecoderOutputs:
        """Outputs of the student's own queries."""
        return self.groups[MAIN]


class Matches(Protocol):
    """Solutions of the problems that ``Method.costs`` posed."""

    def __call__(self, name: str) -> AbstractContextManager[Assignment]:
        """Wait for a solution; ask for it last, and compute what needs it inside.

        On a GPU that is another stream, so that the backward pass of all other losses need not
        wait for the matching.
        """
        ...


class AddedTerm(Protocol):
    """A term that a method adds to its own: what it is divided by, and its losses."""

    def normalisers(self, teacher: TeacherOutputs, targets: Targets) -> dict[str, Tensor]:
        """As of ``Method``."""
        ...

    def losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """As of ``Method``, without pairs of minimal cost."""
        ...


class Method(nn.Module, ABC):
    """What a student learns from a teacher; the default answers are those of no method.

    It is a module, as it may hold parameters that only training has (linear maps between widths).
    It is made as ``Class(config, student, teacher, seed=seed)``: of its section of the
    configuration, both detectors' architectures, and the seed of whatever it draws.

    Attributes:
        config_class: its section of the configuration.
        needs_teacher_outputs: whether the teacher runs; a control may use no more than its queries.
        needs_attention: whether decoders return their attention maps.
        needs_distributions: whether the teacher's distributions over edges are compared.
        needs_features: whether the teacher's memory and last decoder states are compared.
        needs_scores: whether the class scores of encoders' tokens are compared.
        needs_decoder: whether the teacher's decoder runs; without it, it has no groups.
        needs_own_queries: whether the teacher's own queries are decoded, or ``teacher_groups``
            alone.
        makes_queries_of_objects: whether ``teacher_groups`` do, which depend on ground truth.
        denoising: the student's denoising queries, of which the teacher decodes the same; None: it
            decodes none.
        takes_boxes: whether the teacher is boxes that the targets carry, and no network.
        groups_need_images: whether student groups depend on the teacher's outputs of a batch, so
            that the student's decoder has to wait for the teacher.
        draws_in_steps: whether the host draws random numbers in every step.
        layers: the teacher's layer for each of the student's.
        adaptive: how main groups are matched, for methods that do; its pairs are watched during
            training (``matching/stability``).
        refinement: of the outputs of the teacher's own queries, before anything else sees them.
    """

    config_class: ClassVar[type[MethodConfig]]
    needs_teacher_outputs: bool = False
    needs_attention: bool = False
    needs_distributions: bool = False
    needs_features: bool = False
    needs_scores: bool = False
    needs_decoder: bool = True
    needs_own_queries: bool = True
    makes_queries_of_objects: bool = False
    takes_boxes: bool = False
    groups_need_images: bool = False
    draws_in_steps: bool = False
    layers: list[int]
    denoising: DenoisingConfig | None = None
    adaptive: AdaptiveMatching | None = None
    refinement: TeacherRefinement | None = None

    @classmethod
    def check_compatible(
        cls, config: MethodConfig, student: DetectorConfig, teacher: DetectorConfig, classes: int
    ) -> None:
        """Refuse a pair of detectors that a loss cannot bridge, or over which it is always 0.

        Args:
            config: of this method.
            student: its architecture.
            teacher: its architecture.
            classes: C, of both.

        Raises:
            UserError: names the losses and the settings that would help.
        """

    def teacher_groups(
        self, queries: ObjectQueries, targets: Targets | None, step: int
    ) -> dict[str, ObjectQueries]:
        """Further query groups that the teacher decodes.

        Args:
            queries: the teacher's own.
            targets: ground truth, where the caller has it.
            step: optimiser step.
        """
        return {}

    def select(self, teacher: TeacherOutputs) -> TeacherOutputs:
        """What of the teacher's outputs is used; runs beside the student where it can."""
        return teacher

    def student_groups(
        self, teacher: TeacherOutputs, targets: Targets, step: int
    ) -> dict[str, QueryGroup]:
        """Query groups that the student decodes beside its own, in training only.

        Args:
            teacher: its queries; its outputs only where ``groups_need_images``.
            targets: ground truth.
            step: optimiser step.
        """
        return {}

    def costs(
        self, student: StudentOutputs, teacher: TeacherOutputs, targets: Targets
    ) -> dict[str, CostBlock]:
        """Bipartite problems between the student's and the teacher's queries, by name."""
        return {}

    def normalisers(self, teacher: TeacherOutputs, targets: Targets) -> dict[str, Tensor]:
        """What losses are divided by: sums over this batch, added up over the global one."""
        return {}

    def losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        matches: Matches,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Weighted losses against the teacher, by name.

        Args:
            student: outputs of all groups.
            teacher: what ``select`` returned.
            matches: solutions of ``costs``, to be asked for last.
            targets: ground truth; images without labels (``Targets.labelled``) have no objects, and
                what needs to know their objects leaves them out.
            normalisers: of the global batch; ``images``, ``labelled_images`` and ``objects`` are
                there too.

        Returns:
            Scalars; their sum is added to what the groups learn from ground truth. Those over the
            pairs of a problem ``NAME`` are called ``NAME/..``.
        """
        return {}
