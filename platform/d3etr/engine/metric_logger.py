"""Losses and clocks of training steps, and the journal's step records made of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW

from d3etr.engine.distributed import TrainContext
from d3etr.engine.journal import Journal
from d3etr.engine.system_load import SystemLoad
from d3etr.errors import UserError
from d3etr.timing import PhaseTimer

LOADING = "loading"
"""The phase that counts the CPU seconds of loading processes."""


class TrainingDiverged(UserError):  # noqa: N818 - it says what happened
    """A loss became NaN or infinite.

    Args:
        step: optimiser step, from 0.
        what: names of the losses.
        image_ids: the images of that step, as far as this worker knows them.
    """

    def __init__(self, step: int, what: Sequence[str], image_ids: Sequence[int]) -> None:
        self.step, self.what, self.image_ids = step, tuple(what), tuple(image_ids)
        images = ", ".join(map(str, image_ids)) or "of another worker"
        super().__init__(
            f"training diverged: {', '.join(what)} became NaN or infinite at optimiser step "
            f"{step}, image ids {images}. The last good checkpoint is kept. Lower "
            "optimisation.learning_rate or optimisation.clip_norm, use float32, or look at "
            "these images' annotations (d3etr check-data)."
        )


@dataclass
class TrainingCost:
    """What training steps have cost so far, without evaluations and checkpoints.

    Attributes:
        seconds: wall time.
        cpu_seconds: CPU time over all workers, their threads and loading processes; None where a
            part of the run did not count it.
        device_seconds: time of the phases of steps on GPUs, over all workers; None without GPUs.
    """

    seconds: float = 0.0
    cpu_seconds: float | None = 0.0
    device_seconds: float | None = None

    @property
    def clock(self) -> float:
        """The most reliable one that is known: GPU, CPU or wall time, seconds."""
        for known in (self.device_seconds, self.cpu_seconds):
            if known is not None:
                return known
        return self.seconds

    def as_dict(self) -> dict[str, float]:
        """What is known, by its name in summaries."""
        known = {
            "training_seconds": self.seconds,
            "training_cpu_seconds": self.cpu_seconds,
            "training_device_seconds": self.device_seconds,
        }
        return {name: value for name, value in known.items() if value is not None}


@dataclass
class _Step:
    """One optimiser step; the tensors are on the device."""

    step: int
    names: tuple[str, ...]
    losses: Tensor
    image_ids: tuple[int, ...]
    norm: Tensor | None = None


class MetricLogger:
    """Keeps the losses of steps on the device and reads them once per record.

    Reading a loss makes the host wait for the device. Rows are kept per step, so that the first
    step at which a loss stopped being finite is known.

    Args:
        journal: where records go.
        context: the workers whose losses add up.
        optimiser: for its learning rate.
        batch_size: images per optimiser step over all workers.
        steps_per_epoch: optimiser steps.
        on_step: called with the step and the metrics of each record, at rank 0.
        load: of the machine, at rank 0; None records none.
    """

    def __init__(
        self,
        journal: Journal,
        context: TrainContext,
        optimiser: AdamW,
        batch_size: int = 1,
        steps_per_epoch: int = 1,
        on_step: Callable[[int, Mapping[str, float]], None] | None = None,
        load: SystemLoad | None = None,
    ) -> None:
        self._journal, self._context, self._optimiser = journal, context, optimiser
        self._batch_size, self._steps_per_epoch = batch_size, steps_per_epoch
        self._on_step, self._load = on_step, load
        self._names: tuple[str, ...] = ()
        self._steps: list[_Step] = []
        self._started: tuple[float, float] | None = None
        self.timer = PhaseTimer(context.device)
        self.cost = TrainingCost()
        self.last: dict[str, float] = {}
        """The metrics of the last record."""

    def add(self, step: int, losses: Mapping[str, Tensor], image_ids: tuple[int, ...]) -> Tensor:
        """Take in the losses of one micro-batch; those of the same step are added up.

        Args:
            step: optimiser step; micro-batches of one step in a row.
            losses: name -> scalar; may be overwritten afterwards. The same names in every
                micro-batch of a step; a step that does not distil has some of them.
            image_ids: the micro-batch's images.

        Returns:
            Scalar: the sum of the losses, ready for backward.
        """
        names = tuple(losses)
        if set(names) >= set(self._names):
            self._names = names
        elif not set(names) <= set(self._names):
            raise ValueError(f"losses changed from {self._names} to {names}")
        values = torch.stack([*losses.values()])
        if self._steps and self._steps[-1].step == step:
            row = self._steps[-1]
            if names != row.names:
                raise ValueError(f"losses changed from {row.names} to {names}")
            row.losses = row.losses + values.detach()
            row.image_ids += image_ids
        else:
            self._steps.append(_Step(step, names, values.detach(), image_ids))
        return values.sum()

    def add_norm(self, norm: Tensor) -> None:
        """Take in the gradient norm of the last step, the same on all workers."""
        self._steps[-1].norm = norm

    def divergence(self, step: int, image_ids: tuple[int, ...], reason: str) -> TrainingDiverged:
        """The error to raise when outputs at ``step`` were not finite.

        That usually shows a step late: if a loss since the last record was the first, it is named.
        """
        for row in self._steps:
            names = _not_finite(row.names, row.losses)
            if names:
                return TrainingDiverged(row.step, names, row.image_ids)
        return TrainingDiverged(step, [f"a matching cost ({reason})"], image_ids)

    def resume_clock(self) -> None:
        """Training steps begin."""
        self._started = _clocks()

    def pause_clock(self) -> None:
        """Something else than training steps begins."""
        self._started = None

    def write(self, step: int) -> None:
        """Record the steps since the last record, up to ``step``; all workers call it.

        Raises:
            TrainingDiverged: a loss or a gradient is not finite.
        """
        if not self._steps:
            return
        names, losses = self._table()
        values = self._context.all_reduce(losses).cpu()
        norms = torch.stack([row.norm for row in self._steps if row.norm is not None]).cpu()
        self._require_finite(names, values, norms)
        means = values.double().mean(0).tolist()
        metrics = {"train/loss": sum(means)}
        for name, mean in zip(names, means, strict=True):
            # A loss that not every step has is averaged over those that have it.
            having = sum(name in row.names for row in self._steps)
            metrics[f"train/{name}"] = mean * (len(self._steps) / having)
        metrics["optimiser/learning_rate"] = self._optimiser.param_groups[0]["lr"]
        metrics["optimiser/gradient_norm"] = float(norms.double().mean())
        self.last = metrics | self._times(len(self._steps))
        recorded = self.last | ({} if self._load is None else self._load.look())
        self._steps.clear()
        epoch = (step - 1) // self._steps_per_epoch
        self._journal.write("step", step, epoch=epoch, metrics=recorded)
        if self._on_step is not None and self._context.rank == 0:
            self._on_step(step, self.last)
            self.resume_clock()  # a hook's time is not training's

    def _table(self) -> tuple[tuple[str, ...], Tensor]:
        """Names of the losses that any step since the last record had, and [steps, losses].

        A step that does not distil has fewer losses; the others are 0 there.
        """
        names = max((row.names for row in self._steps), key=len)
        rows = []
        for row in self._steps:
            named = dict(zip(row.names, row.losses, strict=True))
            absent = row.losses.new_zeros(())
            ordered = [named.get(name, absent) for name in names]
            rows.append(row.losses if row.names == names else torch.stack(ordered))
        return names, torch.stack(rows)

    def _require_finite(self, names: tuple[str, ...], values: Tensor, norms: Tensor) -> None:
        """Losses [steps, losses] summed over workers and gradient norms [steps], on the host."""
        table = torch.cat([values, norms[:, None]], 1)
        if bool(table.isfinite().all()):
            return
        index = int((~table.isfinite()).any(1).nonzero()[0])
        row = self._steps[index]
        elsewhere = bool(row.losses.isfinite().all()) and not bool(values[index].isfinite().all())
        bad = _not_finite((*names, "the gradient's norm"), table[index])
        raise TrainingDiverged(row.step, bad, () if elsewhere else row.image_ids)

    def _times(self, steps: int) -> dict[str, float]:
        """Seconds per step of each phase, and throughput; adds to the cost of the run."""
        before = self.timer.device_seconds
        phases = self.timer.take()
        now = _clocks()
        begun = self._started or now
        self._started = now
        elapsed, cpu = now[0] - begun[0], now[1] - begun[1] + phases.get(LOADING, 0.0)
        on_device = (self.timer.device_seconds or 0.0) - (before or 0.0)
        local = torch.tensor([cpu, on_device], dtype=torch.float64, device=self._context.device)
        cpu, on_device = self._context.all_reduce(local).tolist()
        cost = self.cost
        cost.seconds += elapsed
        cost.cpu_seconds = None if cost.cpu_seconds is None else cost.cpu_seconds + cpu
        if before is not None:
            cost.device_seconds = (cost.device_seconds or 0.0) + on_device
        times = {f"time/{name}": value / steps for name, value in phases.items()}
        times["time/step"] = elapsed / steps
        times["time/images_per_second"] = self._batch_size * steps / max(elapsed, 1e-9)
        return times | {f"time/{name}": value for name, value in cost.as_dict().items()}


def _not_finite(names: Sequence[str], values: Tensor) -> list[str]:
    finite = zip(names, values.isfinite().tolist(), strict=True)
    return [name for name, ok in finite if not ok]


def _clocks() -> tuple[float, float]:
    """Wall time, and CPU time of this process with all its threads, seconds."""
    return time.perf_counter(), time.process_time()
