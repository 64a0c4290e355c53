"""The one module that is trained: a student, its frozen teacher, and all losses between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.denoising import DENOISING, DenoisingConfig
from d3etr.detectors.foundation import FoundationModel
from d3etr.losses.edge_supervision import match_normalisers
from d3etr.losses.set_criterion import detection_problem
from d3etr.losses.supervision import GroundTruthSupervision, Normalisers
from d3etr.matching.assignment import Assignment, Solutions, Solver
from d3etr.methods.base import Method, StudentOutputs, TeacherGroup, TeacherOutputs
from d3etr.methods.gradient_share import GradientShare
from d3etr.methods.selection import map_layers
from d3etr.methods.stored import restored_outputs
from d3etr.registry import METHODS
from d3etr.structures import MAIN, ImageBatch, Memory, ObjectQueries, QueryGroup, Targets

_PARTS_OF_VERSION_0_1 = {
    "auxiliary.": "method.auxiliary.",
    "feature_adapter.": "method.features.feature_adapter.",
}
"""Where tensors of the state dict are now."""


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A distiller's state dict, of version 0.1 or today's, under today's names."""
    for old, new in _PARTS_OF_VERSION_0_1.items():
        state = {new + x.removeprefix(old) if x.startswith(old) else x: state[x] for x in state}
    return dict(state)


def _touching(method: Method, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses of a plain step, with a gradient of 0 for what the method itself trains.

    So the same parameters have gradients in every step, as DDP and recorded graphs want it.
    """
    own = [p.sum() for p in method.parameters() if p.requires_grad]
    if not own:
        return losses
    name, loss = next(iter(losses.items()))
    return losses | {name: loss + 0.0 * torch.stack(own).sum()}


def _teacher_groups(
    teacher: DetectionTransformer,
    queries: ObjectQueries,
    memory: Memory,
    method: Method,
    targets: Targets | None,
    step: int,
) -> dict[str, TeacherGroup]:
    """What the teacher decodes, one layer for each of the student's; ``queries`` are its own."""
    groups = {MAIN: queries} if method.needs_own_queries else {}
    groups |= method.teacher_groups(queries, targets, step)
    if method.denoising is not None:
        groups |= _noised(teacher, targets, method.denoising, step)
    decoded = teacher.decode(
        memory,
        [*groups.values()],
        attention=method.needs_attention,
        maps_of_blocks=method.denoising is not None,
    )
    if not method.needs_distributions:
        decoded = [replace(part, distributions=None) for part in decoded]
    outputs = [map_layers(part, method.layers) for part in decoded]
    if not method.needs_features:
        outputs = [replace(part, states=None) for part in outputs]
    pairs = zip(groups.items(), outputs, strict=True)
    return {name: TeacherGroup(own, part) for (name, own), part in pairs}


def _noised(
    teacher: DetectionTransformer, targets: Targets | None, config: DenoisingConfig, step: int
) -> dict[str, ObjectQueries]:
    """The student's denoising queries as the teacher's."""
    if targets is None:
        raise ValueError("denoising queries are made of ground truth, which is not given")
    group = teacher.denoising_queries(targets, config, step)
    return {DENOISING: group.queries.detach()}


def _selected(
    teacher: TeacherOutputs,
    targets: Targets | None,
    method: Method,
    supervision: GroundTruthSupervision,
) -> TeacherOutputs:
    """What the method uses of a teacher's outputs, refined where it wants them so."""
    if method.refinement is None:
        return method.select(teacher)
    if targets is None:
        raise ValueError("a teacher's outputs are refined by ground truth, which is not given")
    name = "teacher queries against objects"
    problem = detection_problem(name, teacher.main, targets, supervision.criterion)
    [assignment] = supervision.solver.start([problem]).result()
    outputs = method.refinement(teacher.main, targets, assignment)
    main = replace(teacher.groups[MAIN], outputs=outputs)
    return method.select(replace(teacher, groups={**teacher.groups, MAIN: main}))


def _detector_outputs(
    teacher: DetectionTransformer,
    images: ImageBatch,
    method: Method,
    targets: Targets | None,
    step: int,
    supervision: GroundTruthSupervision,
) -> TeacherOutputs:
    """As much of a detector's outputs as the method needs, or what was stored of them."""
    if not method.needs_teacher_outputs:
        own = None if teacher.config.queries_need_images else teacher.object_queries().detach()
        return TeacherOutputs(own)
    if images.stored is not None:
        stored = restored_outputs(images.stored, teacher, method.layers)
        return _selected(stored, targets, method, supervision)
    memory = teacher.encode(images.for_teacher or images)
    kept = memory if method.needs_features or method.needs_scores else None
    if not method.needs_decoder:
        return TeacherOutputs(None, memory=kept)
    queries = teacher.object_queries(memory).detach()
    groups = _teacher_groups(teacher, queries, memory, method, targets, step)
    return _selected(TeacherOutputs(queries, groups, kept), targets, method, supervision)


def _build_method(
    student: DetectionTransformer,
    teacher: DetectionTransformer | FoundationModel | None,
    config: MethodConfig,
    seed: int,
) -> Method:
    """The method, after a look at whether it can bridge the detectors; the teacher is frozen."""
    kind: type[Method] = METHODS.find(config.method)
    if not config.needs_teacher:
        return kind()
    if isinstance(teacher, DetectionTransformer):
        kind.check_compatible(config, student.config, teacher.config, student.classes)
    if teacher is not None:
        teacher.eval().requires_grad_(False)
    networks = [part.config for part in (student, teacher) if part is not None]
    return kind(config, *networks, seed=seed)


class Distiller(nn.Module):
    """Student and teacher in, named losses out.

    The teacher is no submodule: it is not in ``parameters``, ``state_dict``, ``train`` or
    ``to``, and DDP never sees it. Put it on the student's device before.

    Per optimiser step: ``run_teacher`` on every micro-batch, add up their ``normalisers`` over
    micro-batches and workers, then call the module on each. Its losses then add up to the
    global batch's loss whatever the number of workers and micro-batches.
    """

    def __init__(
        self,
        student: DetectionTransformer,
        teacher: DetectionTransformer | FoundationModel | None,
        distillation: MethodConfig,
        criterion: SetCriterionConfig,
        *,
        seed: int,
    ) -> None:
        """Put the parts together.

        Args:
            student: the detector that is trained.
            teacher: the network that teaches; None exactly when the method needs none.
            distillation: the method's configuration.
            criterion: weights of the set criterion and its matching.
            seed: of what the method draws.

        Raises:
            UserError: a configured loss cannot bridge the two detectors.
        """
        super().__init__()
        if (teacher is not None) != distillation.needs_network:
            raise ValueError("a teacher's network goes with the methods that need one")
        self.student = student
        self.supervision = GroundTruthSupervision(
            criterion, Solver(), student.config.proposals_tell_classes
        )
        self.share = GradientShare.of(distillation)  # of the weight of all the method's losses
        self._teacher = (teacher,)  # inside a tuple, nn.Module does not register it
        self.method = _build_method(student, teacher, distillation, seed)

    @property
    def solver(self) -> Solver:
        """Of all bipartite problems."""
        return self.supervision.solver

    @property
    def teacher(self) -> DetectionTransformer | None:
        """The frozen teacher, where it is a detector."""
        [teacher] = self._teacher
        return teacher if isinstance(teacher, DetectionTransformer) else None

    @property
    def foundation(self) -> FoundationModel | None:
        """The frozen teacher, where it is a foundation model."""
        [teacher] = self._teacher
        return teacher if isinstance(teacher, FoundationModel) else None

    @torch.no_grad()
    def run_teacher(
        self, images: ImageBatch, step: int = 0, targets: Targets | None = None
    ) -> TeacherOutputs | None:
        """The teacher's outputs for a batch, or what was stored of them; None without a teacher.

        Not in inference mode: such tensors cannot take part in the student's graph.

        Args:
            images: B padded images, of which it sees ``for_teacher`` where that is there.
            step: optimiser step, for what the method draws.
            targets: ground truth; None only where the method makes nothing of it here.
        """
        [teacher], method = self._teacher, self.method
        if teacher is None:
            return TeacherOutputs(None) if method.takes_boxes else None
        if isinstance(teacher, FoundationModel):
            return TeacherOutputs(None, memory=teacher.encode(images.for_teacher or images))
        return _detector_outputs(teacher, images, method, targets, step, self.supervision)

    @torch.no_grad()
    def normalisers(
        self, targets: Targets, teacher: TeacherOutputs | None, step: int = 0
    ) -> Normalisers:
        """Sums by name that the losses of the global batch are divided by; add them up.

        Args:
            targets: ground truth of a micro-batch.
            teacher: what ``run_teacher`` returned for it.
            step: optimiser step.
        """
        truth = targets.of_labelled()
        sums = {"objects": truth.num_objects.sum().float()}
        for name, images in {"images": targets, "labelled_images": truth}.items():
            sums[name] = torch.full_like(sums["objects"], len(images.counts))
        if teacher is not None:
            sums |= self.method.normalisers(teacher, targets)
        kind = self.student.config
        if kind.softmax_classes or kind.refines_distributions:
            sizes = {MAIN: kind.queries}
            if teacher is not None:
                groups = self.method.student_groups(teacher, targets, step)
                sizes |= {name: group.queries.count for name, group in groups.items()}
            if kind.softmax_classes:
                sums |= self.supervision.class_normalisers(sizes, targets)
            if kind.refines_distributions:
                sums |= match_normalisers(sizes, truth)
        return sums

    def forward(
        self,
        images: ImageBatch,
        targets: Targets,
        teacher: TeacherOutputs | None,
        normalisers: Normalisers,
        distillation_scale: float | Tensor = 1.0,
        *,
        step: int = 0,
        side_stream: torch.cuda.Stream | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses of one micro-batch; their sum is what is minimised.

        Args:
            images: B padded images.
            targets: their ground truth.
            teacher: what ``run_teacher`` returned for them; None in a step that does not distil.
            normalisers: sums over the global batch.
            distillation_scale: factor on the method's losses, a number or a scalar: that of the
                warm-up, or 0 for the gradients of detection alone.
            step: optimiser step.
            side_stream: of a GPU: losses over matched pairs are computed on it. Callers
                synchronise before reading them; a backward pass need not.

        Returns:
            Named scalars: ``detection/..``, ``<group>/..`` and, of a two-stage student,
            ``proposals/..`` against ground truth, then the method's.

        Raises:
            NonFiniteCostError: an output is NaN or infinite, and the host solved the matching
                problems. Where a GPU did, a loss over the pairs concerned is NaN instead.
        """
        student, groups, of_teacher = self._decode(images, targets, teacher, step)
        # Losses and matching stay float32 whatever the precision of the passes.
        with torch.autocast(images.pixels.device.type, enabled=False):
            supervised = self.supervision.begin(
                student.groups, groups, student.memory.proposals, of_teacher, targets, normalisers
            )
            if teacher is None:
                return _touching(self.method, supervised())
            problems = self.method.costs(student, teacher, targets)
            solutions = self.solver.start_named(problems)

            @contextmanager
            def matches(name: str) -> Iterator[Assignment]:
                supervised()  # before anybody waits
                if side_stream is not None:
                    side_stream.wait_stream(torch.cuda.current_stream(side_stream.device))
                with torch.cuda.stream(side_stream):
                    yield solutions()[name]

            terms = self.method.losses(student, teacher, matches, targets, normalisers)
            if self.share is not None:
                distillation_scale = distillation_scale * self.share.factor
            scaled = {}
            for name, loss in terms.items():
                matched = name.partition("/")[0] in problems
                with torch.cuda.stream(side_stream if matched else None):
                    scaled[name] = distillation_scale * loss
        return supervised() | scaled

    def _decode(
        self, images: ImageBatch, targets: Targets, teacher: TeacherOutputs | None, step: int
    ) -> tuple[StudentOutputs, Mapping[str, QueryGroup], Solutions]:
        """All query groups in one pass over one memory; the teacher's problems begin before."""
        waits = teacher is not None and (teacher.stream is None or self.method.groups_need_images)
        remade = teacher is not None and not waits and teacher.queries is not None
        if teacher is not None and remade and self.teacher is not None:
            # Made anew on this stream: the teacher's may not be there yet.
            teacher = replace(teacher, queries=self.teacher.object_queries().detach())
        if teacher is not None and waits:
            teacher.wait()
        groups = {} if teacher is None else self.method.student_groups(teacher, targets, step)
        if waits:
            of_teacher = self.supervision.start_teachers(groups, targets)
        memory = self.student.encode(images)
        groups = {
            MAIN: QueryGroup(self.student.object_queries(memory)),
            **self.student.training_groups(memory, targets, step),
            **groups,
        }
        queries = [group.queries for group in groups.values()]
        attention = self.method.needs_attention and teacher is not None
        noised = self.method.denoising is not None
        outputs = self.student.decode(memory, queries, attention=attention, maps_of_blocks=noised)
        if not waits:
            if teacher is not None:
                teacher.wait()
            of_teacher = self.supervision.start_teachers(groups, targets)
        decoded = dict(zip(groups, outputs, strict=True))
        return StudentOutputs(memory, decoded, groups[MAIN].queries.place), groups, of_teacher
