"""From losses on the device and running clocks to the journal's step records."""

from __future__ import annotations

import time

from torch.optim import AdamW

from d3etr.training.context import TrainContext
from d3etr.training.divergence import LossWindow
from d3etr.training.journal import Journal
from d3etr.training.timing import PhaseTimer


class StepLog:
    """Reads the loss window now and then: one wait for the device per record.

    Args:
        journal: where records go.
        context: the workers whose losses add up.
        optimiser: to tell its learning rate.
        window: the losses of the steps since the last record.
        timer: the phases of these steps.
        batch_size: images per optimiser step over all workers.
        steps_per_epoch: optimiser steps.
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
    ) -> None:
        self._journal, self._context, self._optimiser = journal, context, optimiser
        self._window, self._timer = window, timer
        self._batch_size, self._steps_per_epoch = batch_size, steps_per_epoch
        self._started: float | None = None
        self.seconds = 0.0
        """Wall time of training steps so far, without evaluations and checkpoints."""
        self.last: dict[str, float] = {}
        """The metrics of the last record."""

    def resume_clock(self) -> None:
        """Training steps begin."""
        self._started = time.perf_counter()

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

    def _times(self, steps: int) -> dict[str, float]:
        """Seconds per step of each phase, and throughput."""
        now = time.perf_counter()
        elapsed = now - (self._started if self._started is not None else now)
        self._started = now
        self.seconds += elapsed
        times = {f"time/{name}": value / steps for name, value in self._timer.take().items()}
        times["time/step"] = elapsed / steps
        times["time/images_per_second"] = self._batch_size * steps / max(elapsed, 1e-9)
        times["time/training_seconds"] = self.seconds
        return times
