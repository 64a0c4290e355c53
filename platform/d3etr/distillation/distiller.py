"""The one module that is trained: a student, its frozen teacher, and all losses between them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from d3etr.config.distillation import DistillationConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.criterion import detection_problem, set_losses
from d3etr.distillation.compatibility import check_compatible
from d3etr.distillation.correspondence import (
    FIXED,
    adaptive_correspondence,
    adaptive_problem,
)
from d3etr.distillation.layers import teacher_layers
from d3etr.distillation.mixmatcher import Branch, mix
from d3etr.distillation.queries import RandomQueries, TeacherQueries
from d3etr.distillation.teaching import Normalisers, Taught, map_layers, normalisers, teaching
from d3etr.matching.assignment import Assignment, CostBlock, assign
from d3etr.structures import DecoderOutputs, Detector, ImageBatch, ObjectQueries, Targets


class Distiller(nn.Module):
    """Student and teacher in, named losses out.

    The teacher is no submodule: it is not in ``parameters``, ``state_dict``, ``train`` or
    ``to``, and DDP never sees it. Put it on the student's device before.

    Per optimiser step: ``teach`` every micro-batch, add up their ``normalisers`` over
    micro-batches and workers, then call the module on each. Its losses then add up to the
    global batch's loss whatever the number of workers and micro-batches.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Detector | None,
        distillation: DistillationConfig,
        criterion: SetCriterionConfig,
        *,
        seed: int,
    ) -> None:
        """Put the parts together.

        Args:
            student: the detector that is trained.
            teacher: the detector that teaches; None exactly when the method is ``none``.
            distillation: what is distilled over which pairs.
            criterion: weights of the set criterion and its matching.
            seed: of random auxiliary queries.

        Raises:
            UserError: a configured loss cannot bridge the two detectors.
        """
        super().__init__()
        if (teacher is None) != (distillation.method == "none"):
            raise ValueError("a teacher goes with every method but 'none'")
        self.student = student
        self.distillation = distillation
        self.criterion = criterion
        self._teacher = (teacher,)  # inside a tuple, nn.Module does not register it
        self.auxiliary: nn.Module | None = None
        if teacher is not None:
            self._prepare(student, teacher, seed)

    def _prepare(self, student: Detector, teacher: Detector, seed: int) -> None:
        config = self.distillation
        check_compatible(student.config, teacher.config, config)
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)
        self._layers = teacher_layers(
            config.layer_map, student.config.decoder_layers, teacher.config.decoder_layers
        )
        if not config.has_auxiliary_group:
            return
        if config.auxiliary_group.queries == "random":
            self.auxiliary = RandomQueries(
                teacher.config, student.config, config.teacher_query_ratio, seed
            )
        else:
            self.auxiliary = TeacherQueries(teacher.config, student.config)

    @property
    def teacher(self) -> Detector | None:
        """The frozen teacher."""
        return self._teacher[0]

    @property
    def needs_teacher_outputs(self) -> bool:
        """Whether the teacher runs; a control may use no more of it than its queries."""
        config = self.distillation
        if config.method == "none" or config.auxiliary_group.queries == "random":
            return False
        supervised = config.auxiliary_group.ground_truth and config.has_auxiliary_group
        by_teacher = supervised and config.auxiliary_group.assignment == "teacher"
        selects = config.teacher_query_ratio < 1 or self._queries_need_images
        return config.distils or by_teacher or selects

    @property
    def _queries_need_images(self) -> bool:
        return self.teacher is not None and self.teacher.config.two_stage

    @property
    def _needs_attention(self) -> bool:
        _, self_attention, cross_attention = self.distillation.terms
        return self.teacher is not None and bool(self_attention or cross_attention)

    @torch.no_grad()
    def teach(self, images: ImageBatch) -> Taught | None:
        """Run the teacher on a batch; None when nothing needs its outputs.

        Not in inference mode: such tensors cannot take part in the student's graph.
        """
        teacher = self.teacher
        if teacher is None or not self.needs_teacher_outputs:
            return None
        memory = teacher.encode(images)
        queries = teacher.object_queries(memory).detach()
        (outputs,) = teacher.decode(memory, [queries], attention=self._needs_attention)
        mapped = map_layers(outputs, self._layers)
        return teaching(mapped, queries, self.distillation.teacher_query_ratio)

    @torch.no_grad()
    def normalisers(self, targets: Targets, taught: Taught | None) -> Tensor:
        """[2 + 2 L] sums that the losses of the global batch are divided by; add them up."""
        return normalisers(
            targets,
            taught,
            self.student.config.queries,
            self.student.config.decoder_layers,
            self.distillation,
        ).pack()

    def forward(
        self,
        images: ImageBatch,
        targets: Targets,
        taught: Taught | None,
        normalisers: Tensor,
        distillation_scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """Weighted losses of one micro-batch; their sum is what is minimised.

        Args:
            images: B padded images.
            targets: their ground truth.
            taught: what ``teach`` returned for them.
            normalisers: sums over the global batch.
            distillation_scale: warm-up factor on the distillation terms.

        Returns:
            Named scalars: ``detection/..``, ``auxiliary/..`` and, of a two-stage student,
            ``proposals/..`` against ground truth, ``adaptive/..`` and ``fixed/..`` against the
            teacher.

        Raises:
            NonFiniteCostError: an output is NaN or infinite.
        """
        divisors = Normalisers.unpack(normalisers)
        main, auxiliary, proposals = self._decode(images, taught)
        problems = self._problems(main, auxiliary, taught, targets)
        some_object = replace(targets, labels=torch.zeros_like(targets.labels))
        if proposals is not None:
            problems["proposals"] = detection_problem(
                "proposals against objects", proposals, some_object, self.criterion
            )
        solved = dict(zip(problems, assign(list(problems.values())), strict=True))
        losses = self._set_losses("detection", main, targets, solved["detection"], divisors)
        if proposals is not None:
            losses |= self._set_losses(
                "proposals", proposals, some_object, solved["proposals"], divisors
            )
        if auxiliary is not None and "auxiliary" in solved:
            losses |= self._set_losses(
                "auxiliary", auxiliary, targets, solved["auxiliary"], divisors
            )
        if taught is not None and self.distillation.distils:
            terms = self._distil(main, auxiliary, taught, solved.get("adaptive"), divisors)
            losses |= {name: distillation_scale * loss for name, loss in terms.items()}
        return losses

    def _decode(
        self, images: ImageBatch, taught: Taught | None
    ) -> tuple[DecoderOutputs, DecoderOutputs | None, DecoderOutputs | None]:
        """Main and auxiliary group in one pass over one memory, and its proposals."""
        memory = self.student.encode(images)
        groups = [self.student.object_queries(memory), *self._auxiliary_queries(taught)]
        outputs = self.student.decode(memory, groups, attention=self._needs_attention)
        return outputs[0], outputs[1] if len(outputs) > 1 else None, memory.proposals

    def _auxiliary_queries(self, taught: Taught | None) -> list[ObjectQueries]:
        if self.auxiliary is None or self.teacher is None:
            return []
        queries = self.teacher.object_queries().detach() if taught is None else taught.queries
        return [self.auxiliary(queries)]

    def _problems(
        self,
        main: DecoderOutputs,
        auxiliary: DecoderOutputs | None,
        taught: Taught | None,
        targets: Targets,
    ) -> dict[str, CostBlock]:
        """Every bipartite problem of this batch, to be solved together."""
        config, criterion = self.distillation, self.criterion
        problems = {
            "detection": detection_problem(
                "student queries against objects", main, targets, criterion
            )
        }
        if auxiliary is not None and config.auxiliary_group.ground_truth:
            by_teacher = config.auxiliary_group.assignment == "teacher" and taught is not None
            whose = taught.group if by_teacher and taught is not None else auxiliary
            name = "teacher queries against objects" if by_teacher else "auxiliary against objects"
            problems["auxiliary"] = detection_problem(name, whose, targets, criterion)
        if config.matches_adaptively and taught is not None:
            problems["adaptive"] = adaptive_problem(main, taught.outputs, config.matching_cost)
        return problems

    def _set_losses(
        self,
        name: str,
        outputs: DecoderOutputs,
        targets: Targets,
        assignment: Assignment,
        divisors: Normalisers,
    ) -> dict[str, Tensor]:
        config = self.criterion
        weights = {
            "class": config.class_weight,
            "l1": config.l1_weight,
            "giou": config.giou_weight,
        }
        terms = set_losses(outputs, targets, assignment, divisors.objects, config)
        return {f"{name}/{term}": weights[term] * loss for term, loss in terms.items()}

    def _distil(
        self,
        main: DecoderOutputs,
        auxiliary: DecoderOutputs | None,
        taught: Taught,
        assignment: Assignment | None,
        divisors: Normalisers,
    ) -> dict[str, Tensor]:
        config = self.distillation
        adaptive = fixed = None
        if assignment is not None:
            pairs = adaptive_correspondence(
                assignment, main, taught.outputs, config.matched_pair_ratio
            )
            adaptive = Branch(main, taught.outputs, pairs, divisors.adaptive, divisors.images)
        if auxiliary is not None:
            fixed = Branch(auxiliary, taught.group, FIXED, divisors.fixed, divisors.images)
        return mix(adaptive, fixed, config)
