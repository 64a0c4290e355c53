"""A teacher that was trained before: measured here instead of trained, tracked like any run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from d3etr.config.tree import Config
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import count_parameters
from d3etr.detectors.weights import WeightsInfo, load_weights
from d3etr.engine.build import open_splits
from d3etr.engine.distributed import TrainContext
from d3etr.engine.journal import KEPT_MAP, Journal
from d3etr.engine.run_folder import RunFolder, numbers
from d3etr.engine.teacher import check_same_classes
from d3etr.errors import UserError
from d3etr.evaluation.evaluator import Evaluator
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
    detector, info = _load(weights, config)
    splits = open_splits(config, context)
    check_same_classes(info, weights, splits.validation)
    journal = Journal(folder.journal)
    journal.cut_back(-1)
    step = int(info.origin.get("step", 0))
    journal.write("start", step, steps=step, steps_per_epoch=max(1, step))
    journal.message(step, f"measuring {weights.name}, trained for {step} steps before")
    detector.to(context.device)
    measured = [
        Evaluator(split, config.data, config.evaluation, context).measure(detector)
        for split in (splits.validation, splits.test)
        if split is not None
    ]
    validation = measured[0].as_dict()
    metrics = {f"val/{name}": value for name, value in validation.items()}
    metrics |= {KEPT_MAP: validation["mAP"]} if "mAP" in validation else {}
    journal.write("evaluation", step, epoch=1, metrics=metrics | {"epoch": 1})
    with clear_disk_errors("the teacher's weights", run_dir), atomic_write(folder.weights) as copy:
        shutil.copyfile(weights, copy)
    # The same names as in a trained run's summary, but for those about training.
    summary: dict[str, Any] = {
        "method": config.distillation.method,
        "seed": config.run.seed,
        "steps": step,
        "kept_step": step,
        **validation,
        "parameters": count_parameters(detector),
        "images_per_second": measured[0].images_per_second,
    }
    for test in measured[1:]:
        summary |= {f"test/{name}": value for name, value in test.as_dict().items()}
    journal.write("end", step, metrics=numbers(summary))
    folder.write_summary(summary)
    return numbers(summary)


def _load(weights: Path, config: Config) -> tuple[DetectionTransformer, WeightsInfo]:
    """Weights that the recipe describes.

    Raises:
        UserError: they are of another detector.
    """
    detector, info = load_weights(weights)
    if (info.detector, info.preprocessing) != (config.student.detector, config.data.preprocessing):
        raise UserError(
            f"{weights} holds another detector than the recipe '{config.run.name}' describes, or "
            "expects other images: use the recipe that it was trained by"
        )
    return detector, info
