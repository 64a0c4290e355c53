"""One training run from configuration to summary, under any launcher."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from d3etr.config.tree import Config
from d3etr.data.allocator import keep_freed_memory
from d3etr.detectors.build import count_parameters
from d3etr.engine.build import (
    Models,
    Splits,
    build_models,
    open_loader,
    open_splits,
    total_steps,
)
from d3etr.engine.checkpoint_saver import BackgroundSaver
from d3etr.engine.checkpoints import CheckpointStore
from d3etr.engine.distributed import TrainContext
from d3etr.engine.divergence import LossWindow
from d3etr.engine.fetching import journal_progress
from d3etr.engine.hooks import Hook, Hooks
from d3etr.engine.journal import Journal
from d3etr.engine.loop import TrainingLoop
from d3etr.engine.metric_logger import MetricLogger
from d3etr.engine.results import INPUTS_KEY, STAMPS_KEY, Inputs
from d3etr.engine.resume import Progress, find_checkpoint, restore_state
from d3etr.engine.run_folder import RunFolder, numbers
from d3etr.engine.step import TrainingStep
from d3etr.engine.teacher import idle_settings, qualify_teacher
from d3etr.engine.validation import Validation
from d3etr.evaluation.evaluator import Evaluator
from d3etr.files import clear_disk_errors, read_json
from d3etr.timing import PhaseTimer


def run_training(
    config: Config, run_dir: Path, context: TrainContext, hooks: Sequence[Hook] = ()
) -> dict[str, float]:
    """Train, or go on training, or return what a finished run found.

    All workers call it. The run resumes from the newest good checkpoint in ``run_dir``; the
    result on the CPU is bit for bit that of an undisturbed run.

    Args:
        config: everything that is needed to repeat the run.
        run_dir: the run's folder, on storage that all workers share.
        context: the workers.
        hooks: people's own code that is told of steps, evaluations and the end; those of
            ``run.hooks`` come on top.

    Returns:
        Final metrics, as in ``summary.json``; mAP as fractions.

    Raises:
        UserError: data, weights or the folder are not as they must be.
        TrainingDiverged: a loss became NaN or infinite.
    """
    finished = _finished(run_dir, context)
    if finished is not None:
        return finished
    if context.rank == 0:
        with clear_disk_errors("the run", run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    with ExitStack() as opened:
        run = _Run(config, run_dir, context, opened, hooks)
        run.train()
        return run.finish()


def _finished(run_dir: Path, context: TrainContext) -> dict[str, float] | None:
    """Metrics of a finished run, None of any other; worker 0 looks, so that all do the same."""
    found = RunFolder(run_dir).read_summary() if context.rank == 0 else None
    there = torch.tensor(int(found is not None), device=context.device)
    if not context.all_reduce(there):
        return None
    return numbers(found if found is not None else read_json(RunFolder(run_dir).summary))


class _Run:
    """The parts of one run, wired together.

    Args:
        config: of the run.
        run_dir: its folder.
        context: the workers.
        opened: takes what must be closed, also where a later part cannot be made.
        hooks: people's own code.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        context: TrainContext,
        opened: ExitStack,
        hooks: Sequence[Hook],
    ) -> None:
        self.config, self.run_dir, self.context = config, run_dir, context
        self.begun = time.perf_counter()
        self.warnings: list[str] = []
        self.journal = Journal(RunFolder(run_dir).journal, active=context.rank == 0)
        self.store = CheckpointStore(
            RunFolder(run_dir).checkpoints, config.run.keep_checkpoints, self.warnings.append
        )
        self.saver = BackgroundSaver(self.store)
        opened.callback(self.saver.close)
        # Before anything is read: what changes from now on has another stamp.
        self.stamps = Inputs().stamps(config) if context.rank == 0 else {}
        self.splits: Splits = open_splits(config, context, journal_progress(self.journal))
        self.warnings.extend(self.splits.warnings)
        self.loader = open_loader(config, self.splits.train, context)
        opened.callback(self.loader.close)
        self.steps = total_steps(config, self.loader.steps_per_epoch)
        self.models: Models = build_models(config, self.splits, context)
        opened.callback(self.models.distiller.solver.close)
        self.evaluator = Evaluator(self.splits.validation, config.data, config.evaluation, context)
        self.hooks = Hooks(
            [*hooks, *config.run.hooks],
            run_dir,
            self.models.student,
            lambda text: self._tell(text, "warning"),
        )
        self.examination = Validation(
            config,
            run_dir,
            context,
            self.models,
            self.splits,
            self.evaluator,
            self.journal,
            self.hooks,
        )
        self.window, self.timer = LossWindow(), PhaseTimer(context.device)
        self.log = MetricLogger(
            self.journal,
            context,
            self.models.optimiser,
            self.window,
            self.timer,
            batch_size=config.optimisation.batch_size,
            steps_per_epoch=self.loader.steps_per_epoch,
            on_step=self.hooks.on_step,
        )
        self.progress = self._resume()
        for setting in idle_settings(config.teacher, self.models.distiller):
            text = f"{setting} has no effect: this method uses nothing that the teacher says"
            self._tell(text, "warning")

    def train(self) -> None:
        """All steps that are left."""
        step = TrainingStep(
            self.models.distiller,
            self.models.optimiser,
            self.models.average,
            self.config,
            self.context,
            steps=self.steps,
            window=self.window,
            timer=self.timer,
        )
        self._tell_of_graphs(step.unsupported_reason())
        loop = TrainingLoop(
            self.config,
            self.context,
            self.models,
            self.loader,
            step,
            self.log,
            self.examination,
            self.saver,
            self.timer,
            steps=self.steps,
        )
        loop.run(self.progress)

    def finish(self) -> dict[str, float]:
        """Measure the test split if asked to, write the summary."""
        test = self.examination.measure_test() if self.splits.test is not None else {}
        self.examination.warn_at_the_end(self.progress.step)
        summary = self._summary(test)
        if self.context.rank == 0:
            self.hooks.on_end(self.progress.step, numbers(summary))
            self.journal.write("end", self.progress.step, metrics=numbers(summary))
            RunFolder(self.run_dir).write_summary(summary)
        return numbers(summary)

    def _resume(self) -> Progress:
        """Go on from a checkpoint, or begin."""
        checkpoint = find_checkpoint(self.store, self.models, self.context)
        if self.context.rank == 0:
            self.store.remove_leftovers()
        if checkpoint is None:
            progress = Progress()
        else:
            progress = restore_state(
                checkpoint, self.models, self.examination, self.log, self.context
            )
        self.journal.cut_back(progress.step if checkpoint is not None else -1)
        self.journal.write(
            "start",
            progress.step,
            steps=self.steps,
            steps_per_epoch=self.loader.steps_per_epoch,
            workers=self.context.world_size,
        )
        for text in self.warnings:
            self.journal.message(progress.step, text, "warning")
        if checkpoint is None:
            self._qualify_teacher(progress)
        if self.models.distiller.method.needs_teacher_outputs:
            self.examination.teacher_mAP = progress.teacher_mAP
        return progress

    def _qualify_teacher(self, progress: Progress) -> None:
        teacher, info = self.models.teacher, self.models.teacher_info
        if teacher is None or info is None or self.config.teacher is None:
            return
        mAP, how = qualify_teacher(
            teacher, info, self.config.teacher, self.config.data, self.evaluator
        )
        progress.teacher_mAP = mAP
        if mAP is not None:
            self.journal.write("teacher", 0, how=how, metrics={"teacher/mAP": mAP})

    def _tell_of_graphs(self, obstacle: str | None) -> None:
        """A setting without effect, or one that would have some."""
        wanted = self.config.optimisation.cuda_graphs
        if wanted and obstacle is not None:
            self._tell(f"optimisation.cuda_graphs has no effect: {obstacle}", "warning")
        if not wanted and obstacle is None:
            self._tell("optimisation.cuda_graphs: true would make steps faster (docs/speed.md)")

    def _tell(self, text: str, level: str = "info") -> None:
        self.journal.message(self.progress.step, text, level)

    def _summary(self, test: dict[str, float]) -> dict[str, Any]:
        kept = self.examination.kept or {"step": 0, "metrics": {}, "images_per_second": 0.0}
        config = self.config
        summary: dict[str, Any] = {
            "method": config.distillation.method,
            "seed": config.run.seed,
            "steps": self.progress.step,
            "kept_step": kept["step"],
            **kept["metrics"],
            **{f"test/{name}": value for name, value in test.items()},
            "parameters": count_parameters(self.models.student),
            "images_per_second": kept["images_per_second"],
            "training_images_per_second": self.log.last.get("time/images_per_second", 0.0),
            **self.log.cost.as_dict(),
            "seconds": time.perf_counter() - self.begun,
            "train/loss": self.log.last.get("train/loss", 0.0),
            INPUTS_KEY: dict(self.models.digests),
            STAMPS_KEY: self.stamps,
        }
        if self.progress.teacher_mAP is not None:
            summary["teacher/mAP"] = self.progress.teacher_mAP
        return summary
