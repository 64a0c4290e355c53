"""The training loop: epochs, logs, examinations, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from d3etr.config.tree import Config
from d3etr.data.loading import EpochLoader
from d3etr.engine.build import Models
from d3etr.engine.checkpoint_saver import BackgroundSaver
from d3etr.engine.distributed import TrainContext
from d3etr.engine.metric_logger import LOADING, MetricLogger
from d3etr.engine.resume import Progress, collect_state
from d3etr.engine.step import MicroBatch, TrainingStep
from d3etr.engine.validation import Validation
from d3etr.timing import PhaseTimer

RECORDS_PER_EPOCH = 20


class TrainingLoop:
    """Runs a training from where it stands to its end.

    Args:
        config: of the run.
        context: the workers.
        models: what is trained.
        loader: training batches.
        step: does one optimiser step.
        log: records steps.
        examination: evaluates and keeps weights.
        saver: saves checkpoints.
        timer: of the phases of a step.
        steps: optimiser steps of the whole run.
    """

    def __init__(
        self,
        config: Config,
        context: TrainContext,
        models: Models,
        loader: EpochLoader,
        step: TrainingStep,
        log: MetricLogger,
        examination: Validation,
        saver: BackgroundSaver,
        timer: PhaseTimer,
        *,
        steps: int,
    ) -> None:
        self._config, self._context, self._models = config, context, models
        self._loader, self._step, self._log = loader, step, log
        self._examination, self._saver, self._timer = examination, saver, timer
        self._steps, self._per_epoch = steps, loader.steps_per_epoch

    def run(self, progress: Progress) -> None:
        """Train until ``progress.step`` is the last step.

        Raises:
            TrainingDiverged: a loss became NaN or infinite.
            UserError: an image cannot be read, or no space is left.
        """
        while progress.step < self._steps:
            self._log.resume_clock()
            self._run_epoch(progress)
            self._log.pause_clock()
            self._finish_epoch(progress)
        self._saver.wait()

    def _run_epoch(self, progress: Progress) -> None:
        """The rest of the epoch that ``progress`` stands in."""
        epoch, offset = divmod(progress.step, self._per_epoch)
        last = min(self._steps, (epoch + 1) * self._per_epoch)
        every = max(1, self._per_epoch // RECORDS_PER_EPOCH)
        batches = self._loader.epoch(epoch, offset)
        for _ in range(progress.step, last):
            self._step(progress.step, self._next(batches))
            progress.step += 1
            self._saver.check()
            pauses = self._saves_at(progress.step) or self._examines_at(progress.step)
            if (progress.step - epoch * self._per_epoch) % every == 0 or pauses:
                self._log.write(progress.step)
            if pauses and progress.step < last:
                self._log.pause_clock()
                self._pause(progress, epoch + 1)
                self._log.resume_clock()
        self._log.write(progress.step)

    def _pause(self, progress: Progress, epoch: int) -> None:
        """Examine before saving: a run that resumes there has its measurement."""
        if self._examines_at(progress.step):
            self._examination.examine(progress.step, epoch)
        if self._saves_at(progress.step):
            self._save(progress)
            self._context.saved()

    def _examines_at(self, step: int) -> bool:
        """Whether ``evaluation.every_steps`` asks for a measurement."""
        return _is_due(step, self._config.evaluation.every_steps)

    def _saves_at(self, step: int) -> bool:
        """Whether ``run.checkpoint_every_steps`` asks for a checkpoint."""
        return _is_due(step, self._config.run.checkpoint_every_steps)

    def _next(self, batches: Iterator[list[MicroBatch]]) -> list[MicroBatch]:
        with self._timer.phase("data", host=True):
            batch = next(batches)
        self._timer.add(LOADING, self._loader.take_cpu_seconds())
        return batch

    def _finish_epoch(self, progress: Progress) -> None:
        """Examine, save and report, as often as configured and always at the end."""
        done = -(-progress.step // self._per_epoch)
        ends = progress.step >= self._steps
        metrics: dict[str, float] = {"step": progress.step, "epoch": done, "final": ends}
        every = self._config.evaluation.every_epochs
        if ends or done % every == 0 or self._examines_at(progress.step):
            mAP = self._examination.examine(progress.step, done)
            metrics |= {} if mAP is None else {"val/mAP": mAP}
        whole = done % self._config.run.checkpoint_every_epochs == 0
        saves = ends or whole or self._saves_at(progress.step)
        if saves:
            self._save(progress)
        if self._context.reads_checkpoints:
            self._saver.wait()
        self._context.report(metrics)
        if saves and not ends:
            self._context.saved()

    def _save(self, progress: Progress) -> None:
        if self._context.rank != 0:
            return
        state = collect_state(progress, self._models, self._examination, self._log)
        weights = self._examination.weights
        self._saver.save(progress.step, state, weights if weights.exists() else None)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
