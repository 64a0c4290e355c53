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
from d3etr.engine.build import Run, build_models, open_loader, open_splits
from d3etr.engine.checkpoints import BackgroundSaver, CheckpointStore
from d3etr.engine.distributed import TrainContext
from d3etr.engine.hooks import Hook, Hooks
from d3etr.engine.journal import Journal
from d3etr.engine.loop import TrainingLoop
from d3etr.engine.metric_logger import MetricLogger
from d3etr.engine.provenance import INPUTS_KEY
from d3etr.engine.resume import resume
from d3etr.engine.run_folder import RunFolder, numbers
from d3etr.engine.step import TrainingStep
from d3etr.engine.system_load import SystemLoad
from d3etr.engine.teacher import foundation_folder, licence_of
from d3etr.engine.validation import Validation
from d3etr.engine.views import prepare_views
from d3etr.files import clear_disk_errors, read_json
from d3etr.progress import PacedProgress

FETCHING_SECONDS = 10.0
"""How often fetching data writes a line into the journal."""


def run_training(
    config: Config, run_dir: Path, context: TrainContext, hooks: Sequence[Hook] = ()
) -> dict[str, float]:
    """Train, or continue training, or return what a finished run found.

    All workers call it. The run resumes from the newest good checkpoint in ``run_dir``; the
    result on the CPU is bit for bit that of an undisturbed run.

    Args:
        config: everything that is needed to repeat the run.
        run_dir: the run's folder, on storage that all workers share.
        context: the workers.
        hooks: people's own code for steps, evaluations and the end, before that of ``run.hooks``.

    Returns:
        Final metrics, as in ``summary.json``; mAP as fractions.

    Raises:
        UserError: data, weights or the folder are not as they must be.
        TrainingDiverged: a loss became NaN or infinite.
    """
    folder = RunFolder(run_dir)
    finished = _finished(folder, context)
    if finished is not None:
        return finished
    if context.rank == 0:
        with clear_disk_errors("the run", run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    with ExitStack() as opened:
        return _train(config, folder, context, [*hooks, *config.run.hooks], opened)


def _finished(folder: RunFolder, context: TrainContext) -> dict[str, float] | None:
    """Metrics of a finished run, None of any other; worker 0 looks, so that all do the same."""
    found = folder.read_summary() if context.rank == 0 else None
    there = torch.tensor(int(found is not None), device=context.device)
    if not context.all_reduce(there):
        return None
    return numbers(found if found is not None else read_json(folder.summary))


def _train(
    config: Config,
    folder: RunFolder,
    context: TrainContext,
    hooks: Sequence[Hook | str],
    opened: ExitStack,
) -> dict[str, float]:
    """Build everything, train the steps that are left, and finish."""
    begun, warnings = time.perf_counter(), list[str]()
    journal = Journal(folder.journal, active=context.rank == 0)
    store = CheckpointStore(folder.checkpoints, config.run.keep_checkpoints, warnings.append)
    saver = BackgroundSaver(store)
    opened.callback(saver.close)
    on_progress = PacedProgress(
        lambda line: journal.message(0, line), FETCHING_SECONDS, FETCHING_SECONDS
    )
    splits = open_splits(config, context, on_progress)
    loader = open_loader(config, splits.train, context)
    opened.callback(loader.close)
    models = build_models(config, splits, context)
    opened.callback(models.distiller.solver.close)
    views = prepare_views(config, splits.train, models, context, on_progress)
    if views:
        loader.use_views(*views)
    run = Run(config, folder, context, journal, splits, models)
    watching = Hooks(hooks, folder.path, models.student, run.warn)
    per_epoch, workers = loader.steps_per_epoch, context.world_size
    steps = config.optimisation.total_steps(per_epoch)
    validation = Validation(run, watching, steps)
    watched = context.rank == 0 and config.tracking.system_metrics
    log = MetricLogger(
        journal,
        context,
        models.optimiser,
        config.optimisation.batch_size,
        loader.steps_per_epoch,
        lambda step, metrics: watching.call("on_step", step, metrics),
        SystemLoad(context.device) if watched else None,
    )
    resumed = resume(store, run, validation, log)
    journal.cut_back(run.step if resumed else -1)
    journal.write("start", run.step, steps=steps, steps_per_epoch=per_epoch, workers=workers)
    for text in (*splits.warnings, *warnings):
        run.warn(text)
    if not resumed:
        validation.measure_teacher()
    step = TrainingStep(config, context, models, steps, log)
    _warn_of_settings(run, step)
    TrainingLoop(run, loader, step, log, validation, saver).run()
    summary = _summary(run, validation, log) | {"seconds": time.perf_counter() - begun}
    validation.warn_at_the_end()
    if context.rank == 0:
        watching.call("on_end", run.step, numbers(summary))
        journal.write("end", run.step, metrics=numbers(summary))
        folder.write_summary(summary)
    return numbers(summary)


def _warn_of_settings(run: Run, step: TrainingStep) -> None:
    """Name settings without effect, one that would have some, and a foundation model's licence."""
    config, reason = run.config, step.unsupported_reason()
    method, folder = run.models.distiller.method, foundation_folder(run.config)
    if folder is not None:
        level = "info" if folder.licence else "warning"
        run.journal.message(run.step, licence_of(folder), level)
    if config.teacher is not None and not method.needs_teacher_outputs:
        for key in ("precision", "image_scale"):
            if getattr(config.teacher, key) != type(config.teacher).model_fields[key].default:
                text = f"teacher.{key} has no effect: this method uses no outputs of the teacher"
                run.warn(text)
    if config.optimisation.cuda_graphs and reason is not None:
        run.warn(f"optimisation.cuda_graphs has no effect: {reason}")
    if not config.optimisation.cuda_graphs and reason is None:
        text = "optimisation.cuda_graphs: true would make steps faster (docs/speed.md)"
        run.journal.message(run.step, text)


def _summary(run: Run, validation: Validation, log: MetricLogger) -> dict[str, Any]:
    test = validation.measure_test()
    kept = validation.kept or {"step": 0, "metrics": {}, "images_per_second": 0.0}
    summary: dict[str, Any] = {
        "method": run.config.distillation.method,
        "seed": run.config.run.seed,
        "steps": run.step,
        "kept_step": kept["step"],
        **kept["metrics"],
        **{f"test/{name}": value for name, value in test.items()},
        "parameters": count_parameters(run.models.student),
        "images_per_second": kept["images_per_second"],
        "training_images_per_second": log.last.get("time/images_per_second", 0.0),
        **log.cost.as_dict(),
        "train/loss": log.last.get("train/loss", 0.0),
        INPUTS_KEY: dict(run.models.digests),
    }
    train = run.splits.train
    others = train.parts[-1] if train.parts else train.unlabelled
    if others is not None:
        summary["unlabelled_images"] = len(others.records)
    if validation.teacher_mAP is not None:
        summary["teacher/mAP"] = validation.teacher_mAP
    return summary
