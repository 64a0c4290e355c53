"""The training loop: epochs, logs, evaluations, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator

from d3etr.data.loading import EpochLoader
from d3etr.engine.build import Run
from d3etr.engine.checkpoints import BackgroundSaver
from d3etr.engine.forecast import Forecast
from d3etr.engine.metric_logger import LOADING, MetricLogger
from d3etr.engine.resume import collect_state
from d3etr.engine.step import MicroBatch, TrainingStep
from d3etr.engine.validation import Validation

RECORDS_PER_EPOCH = 20


class TrainingLoop:
    """Runs a training from where it stands to its end.

    Args:
        run: what is trained.
        loader: training batches.
        step: does one optimiser step.
        log: records steps.
        validation: evaluates and keeps weights.
        saver: saves checkpoints.
    """

    def __init__(
        self,
        run: Run,
        loader: EpochLoader,
        step: TrainingStep,
        log: MetricLogger,
        validation: Validation,
        saver: BackgroundSaver,
    ) -> None:
        self._run, self._loader, self._step = run, loader, step
        self._log, self._validation, self._saver = log, validation, saver
        self._per_epoch = loader.steps_per_epoch
        self._steps = run.config.optimisation.total_steps(self._per_epoch)
        self._forecast = Forecast(
            run.journal,
            self._steps,
            run.step,
            run.config.evaluation.times(run.step, self._steps, self._per_epoch),
            run.config.run.minutes,
        )

    def run(self) -> None:
        """Train until ``run.step`` is the last step.

        Raises:
            TrainingDiverged: a loss became NaN or infinite.
            UserError: an image cannot be read, or no space is left.
        """
        while self._run.step < self._steps:
            self._log.resume_clock()
            self._run_epoch()
            self._log.pause_clock()
            self._finish_epoch()
        self._saver.wait()

    def _run_epoch(self) -> None:
        """The rest of the epoch in which the run stands."""
        run = self._run
        epoch, offset = divmod(run.step, self._per_epoch)
        last = min(self._steps, (epoch + 1) * self._per_epoch)
        every = max(1, self._per_epoch // RECORDS_PER_EPOCH)
        batches = self._loader.epoch(epoch, offset)
        for _ in range(run.step, last):
            self._forecast.begin_step()
            self._step(run.step, self._next(batches))
            run.step += 1
            self._steer()
            self._forecast.end_step(run.step)
            self._saver.check()
            pauses = self._saves() or self._evaluates()
            if (run.step - epoch * self._per_epoch) % every == 0 or pauses:
                self._log.write(run.step)
            if pauses and run.step < last:
                self._log.pause_clock()
                self._pause(epoch + 1)
                self._log.resume_clock()
        self._log.write(run.step)

    def _steer(self) -> None:
        """Change distillation's weight by its share of the gradient, before that is saved."""
        run, share = self._run, self._run.models.distiller.share
        changed = share and share.steer(run.step, self._steps, self._per_epoch)
        if changed:
            run.journal.message(run.step, f"distillation.gradient_share: {changed}")

    def _pause(self, epoch: int) -> None:
        """Evaluate before saving: a run that resumes there has its measurement."""
        if self._evaluates():
            self._measure(epoch)
        if self._saves():
            self._save()

    def _measure(self, epoch: int) -> float | None:
        begun = time.perf_counter()
        mAP = self._validation.measure(epoch)
        self._forecast.end_evaluation(self._run.step, time.perf_counter() - begun)
        return mAP

    def _evaluates(self) -> bool:
        """Whether ``evaluation.every_steps`` asks for a measurement now."""
        every = self._run.config.evaluation.every_steps
        return every is not None and self._run.step % every == 0

    def _saves(self) -> bool:
        """Whether ``run.checkpoint_every_steps`` asks for a checkpoint now."""
        every = self._run.config.run.checkpoint_every_steps
        return every is not None and self._run.step % every == 0

    def _next(self, batches: Iterator[list[MicroBatch]]) -> list[MicroBatch]:
        with self._log.timer.phase("data", host=True):
            batch = next(batches)
        self._log.timer.add(LOADING, self._loader.take_cpu_seconds())
        return batch

    def _finish_epoch(self) -> None:
        """Evaluate, save and report, as often as configured and always at the end."""
        run, config = self._run, self._run.config
        done = -(-run.step // self._per_epoch)
        ends = run.step >= self._steps
        metrics: dict[str, float] = {"step": run.step, "epoch": done, "final": ends}
        if ends or done % config.evaluation.every_epochs == 0 or self._evaluates():
            mAP = self._measure(done)
            metrics |= {} if mAP is None else {"val/mAP": mAP}
        if ends or done % config.run.checkpoint_every_epochs == 0 or self._saves():
            self._save()
        run.context.report(metrics)

    def _save(self) -> None:
        if self._run.context.rank == 0:
            state = collect_state(self._run, self._validation, self._log)
            weights = self._run.folder.weights
            self._saver.save(self._run.step, state, weights if weights.exists() else None)
