"""From a finished run folder to its figures: a few images on the CPU, within a minute."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from d3etr.config.tree import Config
from d3etr.data.splits import DetectionSplit, open_split
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.journal import read_journal
from d3etr.engine.run_folder import RunFolder
from d3etr.evaluation.evaluator import Evaluator
from d3etr.fonts import readable_names
from d3etr.inference import Predictor, load
from d3etr.tracking.description import title
from d3etr.tracking.figures.curves import Series, draw_precision_recall, draw_series
from d3etr.tracking.figures.images import draw_attention, draw_predictions
from d3etr.tracking.figures.look import (
    TEACHER,
    THRESHOLD,
    choose_images,
    look_at,
    object_view,
    scene_of,
    spaced,
)
from d3etr.tracking.figures.style import save

IMAGES = 4
MEASURING_SECONDS = 20.0
"""Time for precision and recall, per detector; fewer images are measured where that is short."""
SPLIT: Literal["validation"] = "validation"

Predictors = Mapping[str, Predictor]


def draw_figures(config: Config, run_dir: Path, folder: Path) -> list[Path]:
    """Draw predictions, attention, precision over recall and how stable the matching was.

    Args:
        config: the run's configuration; relative paths must hold here.
        run_dir: its folder, with journal and weights.
        folder: where the PNG files go.

    Returns:
        The files, in the order a reader wants them.

    Raises:
        UserError: weights or data cannot be read.
    """
    run, predictors = RunFolder(run_dir), {}
    if config.teacher is not None and config.teacher.weights is not None:
        predictors[TEACHER] = load(config.teacher.weights, "cpu")
    own = "Student" if predictors or config.run.role == "student" else TEACHER
    predictors[own] = load(run.weights, "cpu")
    split = open_split(config.data, SPLIT)
    names = readable_names((each.id, each.name) for each in split.categories)
    drawn = _draw_images(config, split, predictors, names, folder)
    drawn.append(_draw_measured(config, split, predictors, names, folder))
    if config.distillation.matches_adaptively:
        drawn.append(_draw_stability(config, run, folder))
    return drawn


def _draw_images(
    config: Config, split: DetectionSplit, predictors: Predictors, names: list[str], folder: Path
) -> list[Path]:
    records = choose_images(split, IMAGES)
    scenes = [scene_of(split, record, predictors) for record in records]
    figure = draw_predictions(scenes, THRESHOLD, f"{SPLIT} images")
    drawn = [save(figure, folder / "predictions.png")]
    seen = {
        name: look_at(predictor.detector, split, records, config.data, _scale_for(name, config))
        for name, predictor in predictors.items()
    }
    views = [object_view(split, record, seen, names) for record in records]
    if shown := [view for view in views if view is not None]:
        drawn.append(save(draw_attention(shown), folder / "attention.png"))
    return drawn


def _draw_measured(
    config: Config, split: DetectionSplit, predictors: Predictors, names: list[str], folder: Path
) -> Path:
    slowest = max(_seconds_per_image(each, split, config) for each in predictors.values())
    records = spaced(split.records, max(1, int(MEASURING_SECONDS / slowest)))
    part = replace(split, records=tuple(records))
    data = config.data.model_copy(update={"workers": 0})
    context, measured = SingleProcess(torch.device("cpu")), {}
    for name, each in predictors.items():
        scale = _scale_for(name, config)
        evaluator = Evaluator(part, data, config.evaluation, context, scale)
        measured[name] = evaluator.measure(each.detector).metrics
    precisions = {name: each.precision for name, each in measured.items() if each is not None}
    subject = f"{len(records)} of {len(split.records)} {SPLIT} images"
    figure = draw_precision_recall(precisions, names, subject)
    return save(figure, folder / "precision_recall.png")


def _scale_for(name: str, config: Config) -> float:
    """How large a run's teacher or its student sees images."""
    return config.teacher_scale if name == TEACHER else 1.0


def _seconds_per_image(predictor: Predictor, split: DetectionSplit, config: Config) -> float:
    """Of the second look at an image: the first one warms up."""
    for _ in range(2):
        begun = time.perf_counter()
        look_at(predictor.detector, split, split.records[:1], config.data)
    return max(time.perf_counter() - begun, 1e-4)


def _draw_stability(config: Config, run: RunFolder, folder: Path) -> Path:
    points = [
        (record["step"], record["metrics"]["matching/stability"])
        for record in read_journal(run.journal)
        if record["kind"] == "evaluation" and "matching/stability" in record["metrics"]
    ]
    series = Series(title(config), [step for step, _ in points], [value for _, value in points])
    figure = draw_series(
        [series],
        "unchanged pairs (%)",
        "Pairs of Adaptive Matching that were the same a measurement before",
        nothing="fewer than two measurements",
    )
    return save(figure, folder / "matching_stability.png")
