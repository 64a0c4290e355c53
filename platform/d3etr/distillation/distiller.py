"""The one module that is trained: a student, its frozen teacher, and all losses between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from d3etr.config.distillation import DistillationConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.criterion import detection_problem, set_losses
from d3etr.distillation.compatibility import check_compatible
from d3etr.distillation.correspondence import FIXED, adaptive_correspondence, adaptive_problem
from d3etr.distillation.features import target_aware_loss
from d3etr.distillation.layers import teacher_layers
from d3etr.distillation.mixmatcher import Branch, mix
from d3etr.distillation.queries import GeneralPoints, auxiliary_queries
from d3etr.distillation.said import Said
from d3etr.distillation.teaching import (
    Normalisers,
    Taught,
    best_confidence,
    map_layers,
    normalisers,
    passed_on,
)
from d3etr.matching.assignment import Assignment, CostBlock, Solver
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
        self.solver = Solver()
        self._teacher = (teacher,)  # inside a tuple, nn.Module does not register it
        self.auxiliary: nn.Module | None = None
        self.feature_adapter: nn.Module | None = None
        self._points: GeneralPoints | None = None
        if teacher is not None:
            self._prepare(student, teacher, seed)

    def _prepare(self, student: Detector, teacher: Detector, seed: int) -> None:
        config = self.distillation
        check_compatible(student.config, teacher.config, config, student.classes)
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)
        self._layers = teacher_layers(
            config.layer_map, student.config.decoder_layers, teacher.config.decoder_layers
        )
        if config.features.weight:
            widths = student.config.width, teacher.config.width
            same = widths[0] == widths[1]
            self.feature_adapter = nn.Identity() if same else nn.Linear(*widths)
        if config.general_points.count:
            self._points = GeneralPoints(config.general_points.count, seed)
        if config.has_auxiliary_group or self._points is not None:
            self.auxiliary = auxiliary_queries(teacher.config, student.config, config, seed)

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
        selects = config.teacher_query_ratio < 1 or self._queries_need_images
        return config.distils or self._teacher_assigns or selects

    @property
    def draws_points(self) -> bool:
        """Whether general points are drawn in every step."""
        return self._points is not None

    @property
    def _queries_need_images(self) -> bool:
        return self.teacher is not None and self.teacher.config.queries_need_images

    @property
    def _needs_attention(self) -> bool:
        _, self_attention, cross_attention = self.distillation.terms
        return self.teacher is not None and bool(self_attention or cross_attention)

    @torch.no_grad()
    def teach(self, images: ImageBatch, step: int = 0) -> Taught | None:
        """Run the teacher on a batch; None when nothing needs its outputs.

        Not in inference mode: such tensors cannot take part in the student's graph.

        Args:
            images: B padded images.
            step: optimiser step, of which general points are drawn.
        """
        teacher = self.teacher
        if teacher is None or not self.needs_teacher_outputs:
            return None
        memory = teacher.encode(images)
        queries = teacher.object_queries(memory).detach()
        groups = [queries]
        if self._points is not None:
            groups.append(self._points.draw(queries, step))
        decoded = teacher.decode(memory, groups, attention=self._needs_attention)
        outputs, *general = [map_layers(part, self._layers) for part in decoded]
        tokens: Tensor | None = memory.tokens
        if self.feature_adapter is None:
            outputs, tokens = replace(outputs, states=None), None
        group, passed = passed_on(outputs, queries, self.distillation.teacher_query_ratio)
        taught = Taught(outputs, group, passed, tokens)
        return replace(taught, general=general[0], points=groups[1]) if general else taught

    @torch.no_grad()
    def normalisers(self, targets: Targets, taught: Taught | None) -> Tensor:
        """[4 + 3 L] sums that the losses of the global batch are divided by; add them up."""
        return normalisers(
            targets,
            taught,
            self.student.config,
            None if self.teacher is None else self.teacher.config,
            self.distillation,
            self.criterion,
        ).pack()

    def forward(
        self,
        images: ImageBatch,
        targets: Targets,
        taught: Taught | None,
        normalisers: Tensor,
        distillation_scale: float | Tensor = 1.0,
        beside: torch.cuda.Stream | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses of one micro-batch; their sum is what is minimised.

        Args:
            images: B padded images.
            targets: their ground truth.
            taught: what ``teach`` returned for them.
            normalisers: sums over the global batch.
            distillation_scale: warm-up factor on the distillation terms, a number or a scalar.
            beside: of a GPU: computes the terms over adaptive pairs, which are found last. Whoever
                reads these losses waits for it; a backward pass need not.

        Returns:
            Named scalars: ``detection/..``, ``auxiliary/..`` and, of a two-stage student,
            ``proposals/..`` against ground truth, ``adaptive/..``, ``fixed/..``, ``general/..``
            and ``features`` against the teacher.

        Raises:
            NonFiniteCostError: an output is NaN or infinite, and the host solved the matching
                problems. Where a GPU did, a loss over the pairs concerned is NaN instead.
        """
        divisors = Normalisers.unpack(normalisers)
        first = self._decode(images, None) if self._runs_beside(taught) else None
        if taught is not None:
            taught.wait()
        of_teacher = self._start(self._teacher_problems(taught, targets))
        said = self._decode(images, taught) if first is None else first
        # Losses and matching stay float32 whatever the precision of the passes.
        with torch.autocast(images.pixels.device.type, enabled=False):
            return self._losses(
                said, taught, targets, of_teacher, divisors, distillation_scale, beside
            )

    def _losses(
        self,
        said: Said,
        taught: Taught | None,
        targets: Targets,
        of_teacher: Callable[[], dict[str, Assignment]],
        divisors: Normalisers,
        distillation_scale: float | Tensor,
        beside: torch.cuda.Stream | None,
    ) -> dict[str, Tensor]:
        """See ``forward``; ``of_teacher`` waits for the teacher's assignment."""
        of_student = self._start(self._student_problems(said, taught, targets))
        of_pairs = self._start(self._adaptive_problems(said, taught))
        # While pairs are found, the hardest to find last: what needs none, or none of these.
        terms = self._terms_without_pairs(said, taught, targets, divisors)
        groups = self._supervise(said, targets, of_teacher(), divisors)
        groups |= self._supervise(said, targets, of_student(), divisors)
        losses = {
            name: loss for group in said.supervised for name, loss in groups.get(group, {}).items()
        }
        rest = {name: distillation_scale * loss for name, loss in terms.items()}
        if beside is not None:
            beside.wait_stream(torch.cuda.current_stream(beside.device))
        with torch.cuda.stream(beside):
            for pairs in of_pairs().values():
                assert taught is not None
                terms = self._adaptive_terms(said, taught, pairs, divisors)
                losses |= {name: distillation_scale * loss for name, loss in terms.items()}
        return losses | rest

    def _runs_beside(self, taught: Taught | None) -> bool:
        """Whether the student need not wait for a teacher that still runs."""
        if taught is None or taught.stream is None or taught.points is not None:
            return False
        return self.distillation.teacher_query_ratio == 1 and not self._queries_need_images

    def _start(self, problems: dict[str, CostBlock]) -> Callable[[], dict[str, Assignment]]:
        """Begin to solve problems; what is returned waits for the solutions."""
        solving = self.solver.start(list(problems.values()))
        return lambda: dict(zip(problems, solving.result(), strict=True))

    def _decode(self, images: ImageBatch, taught: Taught | None) -> Said:
        """All query groups in one pass over one memory."""
        memory = self.student.encode(images)
        groups = {"detection": self.student.object_queries(memory)}
        groups |= self._further_queries(taught)
        decoded = self.student.decode(
            memory, list(groups.values()), attention=self._needs_attention
        )
        return Said(memory, dict(zip(groups, decoded, strict=True)))

    def _further_queries(self, taught: Taught | None) -> dict[str, ObjectQueries]:
        """The training-only groups: the teacher's queries, and general points."""
        if self.auxiliary is None or self.teacher is None:
            return {}
        groups = {}
        if self.distillation.has_auxiliary_group:
            queries = None if taught is None else taught.queries
            if queries is None and self.distillation.auxiliary_group.queries == "teacher":
                queries = self.teacher.object_queries().detach()
            groups["auxiliary"] = self.auxiliary(queries)
        if taught is not None and taught.points is not None:
            groups["general"] = self.auxiliary(taught.points)
        return groups

    @property
    def _teacher_assigns(self) -> bool:
        """Whether the teacher's assignment supervises the auxiliary group."""
        group = self.distillation.auxiliary_group
        supervised = self.distillation.has_auxiliary_group and group.ground_truth
        return supervised and group.assignment == "teacher"

    def _teacher_problems(self, taught: Taught | None, targets: Targets) -> dict[str, CostBlock]:
        """The bipartite problems that are known before the student runs."""
        if taught is None or not self._teacher_assigns:
            return {}
        name = "teacher queries against objects"
        return {"auxiliary": detection_problem(name, taught.group, targets, self.criterion)}

    def _student_problems(
        self, said: Said, taught: Taught | None, targets: Targets
    ) -> dict[str, CostBlock]:
        """All other bipartite problems of queries against objects, to be solved together."""
        config = self.distillation
        names = {"detection": "student queries against objects"}
        if config.auxiliary_group.ground_truth and (taught is None or not self._teacher_assigns):
            names["auxiliary"] = "auxiliary against objects"
        names["proposals"] = "proposals against objects"
        return {
            group: detection_problem(
                names[group], outputs, said.truth(group, targets), self.criterion
            )
            for group, outputs in said.supervised.items()
            if group in names
        }

    def _adaptive_problems(self, said: Said, taught: Taught | None) -> dict[str, CostBlock]:
        """The bipartite problems of Adaptive Matching."""
        config = self.distillation
        if taught is None or not config.matches_adaptively:
            return {}
        problem = adaptive_problem(said.main, taught.outputs, config.matching_cost)
        return {"adaptive": problem}

    def _supervise(
        self,
        said: Said,
        targets: Targets,
        assignments: dict[str, Assignment],
        divisors: Normalisers,
    ) -> dict[str, dict[str, Tensor]]:
        """Losses against ground truth of each group that there is an assignment for."""
        return {
            group: self._set_losses(
                group, outputs, said.truth(group, targets), assignments[group], divisors
            )
            for group, outputs in said.supervised.items()
            if group in assignments
        }

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
        classes = divisors.classes[int(name == "auxiliary")]
        terms = set_losses(outputs, targets, assignment, divisors.objects, config, classes)
        losses = {f"{name}/{term}": weights[term] * loss for term, loss in terms.items()}
        return assignment.doubted(losses)

    def _adaptive_terms(
        self, said: Said, taught: Taught, assignment: Assignment, divisors: Normalisers
    ) -> dict[str, Tensor]:
        config, student, teacher = self.distillation, said.main, taught.outputs
        pairs = adaptive_correspondence(assignment, student, teacher, config.matched_pair_ratio)
        shares = best_confidence(teacher, self.student.config.queries, config).sum(2)
        branch = Branch(student, teacher, pairs, divisors.adaptive, divisors.images, shares)
        return assignment.doubted(mix({"adaptive": branch}, self.distillation))

    def _terms_without_pairs(
        self, said: Said, taught: Taught | None, targets: Targets, divisors: Normalisers
    ) -> dict[str, Tensor]:
        """Distillation terms over pairs that hold by construction, and of features."""
        config, images = self.distillation, divisors.images
        if taught is None or not config.distils:
            return {}
        branches = {}
        if "auxiliary" in said.groups and config.adaptive_ratio < 1:
            branches["fixed"] = Branch(
                said.groups["auxiliary"], taught.group, FIXED, divisors.fixed, images
            )
        if taught.general is not None:
            branches["general"] = Branch(
                said.groups["general"], taught.general, FIXED, divisors.general, images
            )
        terms = mix(branches, config)
        if self.feature_adapter is not None:
            terms["features"] = config.features.weight * target_aware_loss(
                said.memory, taught, targets, self.feature_adapter, config.features.queries, images
            )
        return terms
