"""A teacher that was trained before: measured here instead of trained, tracked like any run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from d3etr.config.tree import Config
from d3etr.data.splits import DetectionSplit
from d3etr.detectors.build import count_parameters
from d3etr.detectors.weights import WeightsInfo, load_weights
from d3etr.engine.build import open_splits
from d3etr.engine.distributed import TrainContext
from d3etr.engine.journal import Journal
from d3etr.engine.run_folder import RunFolder, numbers
from d3etr.engine.teacher import check_same_classes
from d3etr.errors import UserError
from d3etr.evaluation.evaluator import Evaluation, Evaluator
from d3etr.files import atomic_write, clear_disk_errors


def measure_shipped(
    config: Config, run_dir: Path, context: TrainContext, *, weights: Path
) -> dict[str, float]:
    """Measure finished weights on the run's validation and test split; a task for a launcher.

    Leaves what a training run leaves: journal, weights, summary.

    Args:
        config: the recipe that the weights were trained by.
        run_dir: the run's folder.
        context: one worker.
        weights: the file.

    Returns:
        Final metrics, as in ``summary.json``; mAP as fractions.

    Raises:
        UserError: the file is missing, or another detector than the recipe's.
    """
    folder = RunFolder(run_dir)
    finished = folder.read_summary()
    if finished is not None:
        return numbers(finished)
    detector, info = load_weights(weights)
    splits = open_splits(config, context)
    _require_same_recipe(info, weights, config)
    check_same_classes(info, weights, splits.validation)
    journal = Journal(folder.journal)
    journal.cut_back(-1)
    step = int(info.origin.get("step", 0))
    journal.write("start", step, steps=step, steps_per_epoch=max(1, step))
    journal.message(step, f"measuring {weights.name}, trained for {step} steps before")
    detector.to(context.device)
    validation, test = (
        None if split is None else _evaluator(config, split, context).measure(detector)
        for split in (splits.validation, splits.test)
    )
    assert validation is not None
    metrics = {f"val/{name}": value for name, value in validation.as_dict().items()}
    journal.write("evaluation", step, epoch=1, metrics=metrics | {"epoch": 1})
    _copy(weights, folder.weights)
    summary = _summary(config, step, count_parameters(detector), validation, test)
    journal.write("end", step, metrics=numbers(summary))
    folder.write_summary(summary)
    return numbers(summary)


def _evaluator(config: Config, split: DetectionSplit, context: TrainContext) -> Evaluator:
    return Evaluator(split, config.data, config.evaluation, context)


def _summary(
    config: Config, step: int, parameters: int, validation: Evaluation, test: Evaluation | None
) -> dict[str, Any]:
    """The same names as in a trained run's summary; nothing was trained, so nothing about that."""
    on_test = {} if test is None else test.as_dict()
    return {
        "method": config.distillation.method,
        "seed": config.run.seed,
        "steps": step,
        "kept_step": step,
        **validation.as_dict(),
        **{f"test/{name}": value for name, value in on_test.items()},
        "parameters": parameters,
        "images_per_second": validation.images_per_second,
    }


def _copy(source: Path, target: Path) -> None:
    """Copy a file whole or not at all."""
    what = "the teacher's weights"
    with clear_disk_errors(what, target.parent), atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


def _require_same_recipe(info: WeightsInfo, weights: Path, config: Config) -> None:
    if info.detector != config.student.detector:
        raise UserError(
            f"{weights} holds another detector than the recipe '{config.run.name}' describes: "
            "use the recipe that it was trained by"
        )
    if info.preprocessing != config.data.preprocessing:
        raise UserError(
            f"{weights} expects images as {info.preprocessing!r}, the recipe "
            f"'{config.run.name}' gives {config.data.preprocessing!r}"
        )
