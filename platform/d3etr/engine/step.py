"""One optimiser step: run the teacher, normalise over the global batch, accumulate, update."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d3etr.config.tree import Config
from d3etr.data.sampling import share
from d3etr.detectors.batch_norm import trained_statistics, unchanged
from d3etr.engine.build import Models
from d3etr.engine.distributed import TrainContext
from d3etr.engine.graphs import StepGraphs, unsupported_reason, whole_pass
from d3etr.engine.metric_logger import MetricLogger
from d3etr.engine.optimiser import (
    autocast,
    clip_gradients,
    distillation_scale,
    inherited_factor,
    learning_rate_factor,
    set_learning_rates,
)
from d3etr.engine.seeding import derive_seed, seed_generators
from d3etr.errors import UserError
from d3etr.losses.supervision import Normalisers
from d3etr.matching.assignment import NonFiniteCostError
from d3etr.methods.base import TeacherOutputs
from d3etr.methods.gradient_share import gradients
from d3etr.structures import ImageBatch, Targets

MicroBatch = tuple[ImageBatch, Targets]


class Backward(Protocol):
    """Adds up the gradients of a step."""

    def __call__(self, scale: float, *, record: bool) -> None:
        """Run student, losses and backward pass.

        Args:
            scale: factor on the losses against the teacher.
            record: whether the log takes the losses.
        """


class TrainingStep:
    """Runs optimiser steps.

    The losses of a step are those of its global batch however it is cut: every micro-batch's
    losses are already divided by sums over the global batch, so gradients are added up, not
    averaged. Random numbers (dropout) depend on seed, step and micro-batch alone.

    Args:
        config: of the run.
        context: the workers.
        models: on the worker's device.
        steps: optimiser steps of the whole run.
        log: takes losses, gradient norms and the time of each phase.

    Raises:
        UserError: workers with batch norm would have other numbers of micro-batches.
    """

    _graphs: StepGraphs | None = None

    def __init__(
        self, config: Config, context: TrainContext, models: Models, steps: int, log: MetricLogger
    ) -> None:
        self._config, self._context, self._steps, self._log = config, context, steps, log
        self._distiller, self._optimiser = models.distiller, models.optimiser
        self._average = models.average
        self._model = context.wrap(models.distiller)
        parts = config.micro_batches(context.world_size)
        _require_equal_shares(models.distiller.student, parts, context.world_size)
        self._mine = share(parts, context.rank, context.world_size)
        if config.optimisation.cuda_graphs and self.unsupported_reason() is None:
            parameters = [p for group in self._optimiser.param_groups for p in group["params"]]
            precisions = config.teacher_precision, config.optimisation.precision
            run = whole_pass(self._distiller, context.device, *precisions)
            changed = [*trained_statistics(self._distiller).values()]
            self._graphs = StepGraphs(run, parameters, context.device, changed)

    def unsupported_reason(self) -> str | None:
        """Why ``cuda_graphs`` would have no effect, in words; None where steps can be recorded."""
        if len(self._mine) > 1 or self._context.world_size > 1:
            return "steps of several micro-batches or workers are not recorded"
        if self._config.teacher is not None and self._config.teacher.views is not None:
            return "steps that read teacher.views are not recorded"
        return unsupported_reason(self._distiller, self._context.device)

    def __call__(self, step: int, batches: Sequence[MicroBatch]) -> None:
        """Do optimiser step ``step`` (from 0) on this worker's micro-batches.

        Raises:
            TrainingDiverged: a matching cost is not finite and the host solved its problem.
                Losses, NaN where a GPU did, are checked when the log is written.
        """
        device, timer = self._context.device, self._log.timer
        batches = [(images.to(device), targets.to(device)) for images, targets in batches]
        backward: Backward
        if self._graphs is not None:
            backward = partial(self._replay, step, batches[0], self._graphs)
        else:
            with timer.phase("teacher"):
                teachers, normalisers = self._run_teacher(step, batches)
            backward = partial(self._run_student, step, batches, teachers, normalisers)
        scale = distillation_scale(step, self._config.distillation.warmup)
        # What distillation has of the gradient while it warms up is no measure of its weight.
        share = self._distiller.share if scale == 1 and self._distils(step) else None
        apart = share is not None and share.needs_detection(step, self._steps)
        detection = self._of_detection(backward) if apart else None
        backward(scale, record=True)
        with timer.phase("optimiser"):
            if share is not None:
                share.watch(self._distiller.student, detection)
            self._update(step)

    def _of_detection(self, backward: Backward) -> list[Tensor]:
        """The student's gradients of detection losses alone; leaves no trace in the model."""
        student = self._distiller.student
        with unchanged([*trained_statistics(student).values()]):
            backward(0.0, record=False)
        found = [gradient.clone() for gradient in gradients(student)]
        self._optimiser.zero_grad(set_to_none=True)
        return found

    def _run_teacher(
        self, step: int, batches: Sequence[MicroBatch]
    ) -> tuple[list[TeacherOutputs | None], Normalisers]:
        """The teacher's outputs per micro-batch, and the global batch's normalisers."""
        with autocast(self._config.teacher_precision, self._context.device):
            teachers = [self._teacher_outputs(step, *batch) for batch in batches]
        sums = [
            self._distiller.normalisers(targets, teacher, step)
            for (_, targets), teacher in zip(batches, teachers, strict=True)
        ]
        return teachers, self._over_the_global_batch(sums)

    def _teacher_outputs(
        self, step: int, images: ImageBatch, targets: Targets
    ) -> TeacherOutputs | None:
        distils = self._distils(step)
        return self._distiller.run_teacher(images, step, targets) if distils else None

    def _distils(self, step: int) -> bool:
        """Whether ``step`` is one that distils."""
        return self._config.distillation.distils_at(step, self._steps)

    def _over_the_global_batch(self, sums: Sequence[Normalisers]) -> Normalisers:
        """Sums over micro-batches and workers, by one reduction."""
        packed = [torch.cat([part[name].reshape(-1) for name in sums[0]]) for part in sums]
        local = packed[0] if len(packed) == 1 else torch.stack(packed).sum(0)
        total = self._context.all_reduce(local)
        parts = torch.split(total, [value.numel() for value in sums[0].values()])
        return {
            name: part.reshape(value.shape)
            for (name, value), part in zip(sums[0].items(), parts, strict=True)
        }

    def _run_student(
        self,
        step: int,
        batches: Sequence[MicroBatch],
        teachers: Sequence[TeacherOutputs | None],
        normalisers: Normalisers,
        scale: float,
        *,
        record: bool,
    ) -> None:
        """Losses and gradients of all micro-batches."""
        for index, (batch, teacher) in enumerate(zip(batches, teachers, strict=True)):
            with self._synchronised_if(index == len(batches) - 1):
                self._seed(step, index)
                with self._log.timer.phase("forward"):
                    losses = self._losses(step, batch, teacher, normalisers, scale)
                    if record:
                        total = self._log.add(step, losses, batch[1].image_ids)
                    else:
                        total = torch.stack([*losses.values()]).sum()
                with self._log.timer.phase("backward"):
                    # DDP divides by the world size; the losses are parts of a sum.
                    (total * self._context.world_size).backward()  # type: ignore[no-untyped-call]

    def _losses(
        self,
        step: int,
        batch: MicroBatch,
        teacher: TeacherOutputs | None,
        normalisers: Normalisers,
        scale: float,
    ) -> dict[str, Tensor]:
        images, targets = batch
        try:
            with autocast(self._config.optimisation.precision, self._context.device):
                losses: dict[str, Tensor] = self._model(
                    images, targets, teacher, normalisers, scale, step=step
                )
                return losses
        except NonFiniteCostError as error:
            raise self._log.divergence(step, targets.image_ids, str(error)) from error

    def _replay(
        self, step: int, batch: MicroBatch, graphs: StepGraphs, scale: float, *, record: bool
    ) -> None:
        """Run the teacher, losses and gradients of the only micro-batch, by a graph."""
        with self._log.timer.phase("forward and backward"):
            seed = partial(self._seed, step, 0)
            losses = graphs(*batch, scale, seed, distils=self._distils(step))
            if record:
                self._log.add(step, losses, batch[1].image_ids)

    def _seed(self, step: int, index: int) -> None:
        """Random numbers of a micro-batch."""
        seed = derive_seed(self._config.run.seed, "step", step, self._mine[index])
        seed_generators(seed, self._context.device)

    def _update(self, step: int) -> None:
        config = self._config.optimisation
        self._log.add_norm(clip_gradients(self._optimiser, config.clip_norm))
        factor = learning_rate_factor(step, self._steps, config.schedule)
        set_learning_rates(self._optimiser, factor, inherited_factor(step, config))
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update(step)

    def _synchronised_if(self, last: bool) -> AbstractContextManager[None]:
        """Workers exchange gradients once per step, at the last micro-batch."""
        if last or not isinstance(self._model, DistributedDataParallel):
            return nullcontext()
        skip: AbstractContextManager[None] = self._model.no_sync()
        return skip


def _require_equal_shares(student: nn.Module, parts: int, workers: int) -> None:
    """Refuse batch norm whose workers would wait for each other's statistics in vain."""
    if parts % workers and trained_statistics(student):
        raise UserError(
            f"batch norm that is trained takes its statistics over all workers: {parts} "
            f"micro-batches cannot be shared equally by {workers}. Set cluster.workers to "
            f"{workers}, optimisation.accumulation to a multiple of {workers}, or "
            "student.detector.backbone.norm to 'frozen' or 'group'"
        )
