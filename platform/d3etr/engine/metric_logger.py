"""From losses on the device and running clocks to the journal's step records."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.optim import AdamW

from d3etr.engine.distributed import TrainContext
from d3etr.engine.divergence import LossWindow
from d3etr.engine.journal import Journal
from d3etr.timing import PhaseTimer

LOADING = "loading"
"""The phase that counts the CPU seconds of loading processes."""


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

    def as_dict(self) -> dict[str, float]:
        """What is known, by the name that summaries have for it."""
        known = {
            "training_seconds": self.seconds,
            "training_cpu_seconds": self.cpu_seconds,
            "training_device_seconds": self.device_seconds,
        }
        return {name: value for name, value in known.items() if value is not None}


class MetricLogger:
    """Reads the loss window now and then: one wait for the device per record.

    Args:
        journal: where records go.
        context: the workers whose losses add up.
        optimiser: to tell its learning rate.
        window: the losses of the steps since the last record.
        timer: the phases of these steps.
        batch_size: images per optimiser step over all workers.
        steps_per_epoch: optimiser steps.
        on_step: called with the step and the metrics of each record, at rank 0.
    """

    def __init__(
        self,
        journal: Journal,
        context: TrainContext,
        optimiser: AdamW,
        window: LossWindow,
        timer: PhaseTimer,
        *,
        batch_size: int,
        steps_per_epoch: int,
        on_step: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self._journal, self._context, self._optimiser = journal, context, optimiser
        self._window, self._timer = window, timer
        self._batch_size, self._steps_per_epoch = batch_size, steps_per_epoch
        self._on_step = on_step
        self._started: tuple[float, float] | None = None
        self.cost = TrainingCost()
        self.last: dict[str, float] = {}
        """The metrics of the last record."""

    def resume_clock(self) -> None:
        """Training steps begin."""
        self._started = _clocks()

    def pause_clock(self) -> None:
        """Something else than training steps begins."""
        self._started = None

    def write(self, step: int) -> None:
        """Record the window that ends after ``step`` steps; all workers call it.

        Raises:
            TrainingDiverged: a loss or a gradient in the window is not finite.
        """
        if not len(self._window):
            return
        values = self._context.all_reduce(self._window.rows()).cpu()
        norms = self._window.norms().cpu()
        self._window.check(values, norms)
        means = values.double().mean(0).tolist()
        metrics = {"train/loss": sum(means)}
        metrics |= {f"train/{n}": v for n, v in zip(self._window.names, means, strict=True)}
        metrics["optimiser/learning_rate"] = self._optimiser.param_groups[0]["lr"]
        metrics["optimiser/gradient_norm"] = float(norms.double().mean())
        self.last = metrics | self._times(len(self._window))
        self._window.clear()
        self._journal.write(
            "step", step, epoch=(step - 1) // self._steps_per_epoch, metrics=self.last
        )
        if self._on_step is not None and self._context.rank == 0:
            self._on_step(step, self.last)
            self.resume_clock()  # a hook's time is not training's

    def _times(self, steps: int) -> dict[str, float]:
        """Seconds per step of each phase, and throughput."""
        on_device = self._timer.device_seconds
        phases = self._timer.take()
        if on_device is not None:
            on_device = (self._timer.device_seconds or 0.0) - on_device
        now = _clocks()
        begun = self._started or now
        self._started = now
        elapsed = now[0] - begun[0]
        self._count(elapsed, now[1] - begun[1] + phases.get(LOADING, 0.0), on_device)
        times = {f"time/{name}": value / steps for name, value in phases.items()}
        times["time/step"] = elapsed / steps
        times["time/images_per_second"] = self._batch_size * steps / max(elapsed, 1e-9)
        return times | {f"time/{name}": value for name, value in self.cost.as_dict().items()}

    def _count(self, elapsed: float, cpu: float, on_device: float | None) -> None:
        """Add a window's cost, over all workers."""
        local = torch.tensor([cpu, on_device or 0.0], dtype=torch.float64)
        everywhere = self._context.all_reduce(local.to(self._context.device)).tolist()
        cost = self.cost
        cost.seconds += elapsed
        cost.cpu_seconds = None if cost.cpu_seconds is None else cost.cpu_seconds + everywhere[0]
        if on_device is not None:
            cost.device_seconds = (cost.device_seconds or 0.0) + everywhere[1]


def _clocks() -> tuple[float, float]:
    """Wall time, and CPU time of this process with all its threads, seconds."""
    return time.perf_counter(), time.process_time()
