"""From a finished run folder to its figures: a few images on the CPU, within a minute."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from d3etr.config.tree import Config
from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit, open_split
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.weights import load_weights
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.journal import Record, read_journal
from d3etr.engine.run_folder import RunFolder
from d3etr.evaluation.evaluator import Evaluator
from d3etr.fonts import readable_names
from d3etr.logs import get_logger
from d3etr.storage.fetch import local_file
from d3etr.tracking.description import title
from d3etr.tracking.figures.curves import (
    Series,
    draw_precision_recall,
    draw_stability,
    draw_training,
)
from d3etr.tracking.figures.images import Scene, draw_attention, draw_predictions
from d3etr.tracking.figures.look import (
    Seen,
    choose_images,
    look_at,
    object_view,
    pixels_of,
    spaced,
    truth_of,
)
from d3etr.tracking.figures.style import DETECTORS, PLAIN, TEACHER, Array, save

logger = get_logger(__name__)

IMAGES = 4
THRESHOLD = 0.3
MEASURING_SECONDS = 20.0
"""Time for precision and recall, per detector; fewer images are measured where that is short."""
SPLIT: Literal["validation"] = "validation"


def draw_figures(
    config: Config, run_dir: Path, folder: Path, others: Mapping[str, Path] | None = None
) -> list[Path]:
    """Draw everything that a run can show.

    Args:
        config: the run's configuration; relative paths must hold here.
        run_dir: its folder, with journal and weights.
        folder: where the PNG files go.
        others: more detectors for the attention figure, name -> weights file.

    Returns:
        The files, in the order a reader wants them.

    Raises:
        UserError: weights or data cannot be read.
    """
    own = "Student" if config.teacher is not None or config.run.role == "student" else "Teacher"
    detectors = {}
    if config.teacher is not None:
        with local_file(config.teacher.weights) as file:
            detectors["Teacher"] = load_weights(file)[0]
    detectors[own] = load_weights(RunFolder(run_dir).weights)[0]
    more = {name: load_weights(path)[0] for name, path in (others or {}).items()}
    split = open_split(config.data, SPLIT)
    journal = read_journal(RunFolder(run_dir).journal)
    return [
        *_draw_images(config, split, detectors, more, folder),
        _draw_measured(config, split, detectors, folder / "precision_recall.png"),
        *_draw_history(config, journal, own, folder),
    ]


def _draw_images(
    config: Config,
    split: DetectionSplit,
    detectors: Mapping[str, DetectionTransformer],
    more: Mapping[str, DetectionTransformer],
    folder: Path,
) -> list[Path]:
    records = choose_images(split, IMAGES)
    seen = {
        name: {one.record.id: one for one in look_at(detector, split, records, config.data)}
        for name, detector in {**detectors, **more}.items()
    }
    names = readable_names((each.id, each.name) for each in split.categories)
    scenes = [_scene(split, record, seen, list(detectors), names) for record in records]
    drawn = [
        save(draw_predictions(scenes, THRESHOLD, f"{SPLIT} images"), folder / "predictions.png")
    ]
    views = [
        view for record in records if (view := object_view(split, record, seen, names)) is not None
    ]
    if views:
        drawn.append(save(draw_attention(views), folder / "attention.png"))
    return drawn


def _scene(
    split: DetectionSplit,
    record: ImageRecord,
    seen: Mapping[str, Mapping[int, Seen]],
    shown: Sequence[str],
    names: Sequence[str],
) -> Scene:
    found = {name: seen[name][record.id].objects(names, THRESHOLD) for name in shown}
    return Scene(pixels_of(split, record), truth_of(record, names), found, f"image {record.id}")


def _draw_measured(
    config: Config, split: DetectionSplit, detectors: Mapping[str, DetectionTransformer], path: Path
) -> Path:
    slowest = max(_seconds_per_image(detector, split, config) for detector in detectors.values())
    count = max(1, min(len(split.records), int(MEASURING_SECONDS / slowest)))
    part = replace(split, records=tuple(spaced(split.records, count)))
    data = config.data.model_copy(update={"workers": 0})
    evaluator = Evaluator(part, data, config.evaluation, SingleProcess(torch.device("cpu")))
    precisions: dict[str, Array] = {}
    for name, detector in detectors.items():
        metrics = evaluator.measure(detector).metrics
        if metrics is not None:
            precisions[name] = metrics.precision
    names = readable_names((each.id, each.name) for each in split.categories)
    whole = f"{len(part.records)} of {len(split.records)} {SPLIT} images"
    return save(draw_precision_recall(precisions, names, whole), path)


def _seconds_per_image(
    detector: DetectionTransformer, split: DetectionSplit, config: Config
) -> float:
    """Of the second image: the first one warms up."""
    clock = time.perf_counter()
    for _ in look_at(detector, split, spaced(split.records, 2), config.data):
        elapsed, clock = time.perf_counter() - clock, time.perf_counter()
    return max(elapsed, 1e-4)


def _draw_history(config: Config, journal: Sequence[Record], own: str, folder: Path) -> list[Path]:
    evaluations = [record for record in journal if record["kind"] == "evaluation"]
    teacher = [r["metrics"]["teacher/mAP"] for r in journal if r["kind"] == "teacher"]
    colour = DETECTORS.get(own, PLAIN)
    quality = Series(title(config), *_column(evaluations, "step", "val/mAP"), colour)
    levels = [Series("teacher", [0], teacher[-1:], TEACHER, level=True)] if teacher else []
    drawn = [save(draw_training([quality, *levels]), folder / "validation_mAP.png")]
    if config.distillation.matches_adaptively:
        stable = Series(title(config), *_column(evaluations, "step", "matching/stability"), colour)
        drawn.append(save(draw_stability([stable]), folder / "matching_stability.png"))
    return drawn


def _column(
    evaluations: Sequence[Record], position: str, metric: str
) -> tuple[list[float], list[float]]:
    """Positions and values of the evaluations that have the metric."""
    having = [record for record in evaluations if metric in record["metrics"]]
    places = [record["metrics"].get(position, record.get(position, 0)) for record in having]
    return places, [record["metrics"][metric] for record in having]
