"""COCO metrics of detections: ours beside pycocotools used plainly, equal in all twelve numbers.

Both have read the annotations before. pycocotools begins with the list of dicts that it takes,
ours with the arrays that workers gather.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.coco_shaped import CATEGORIES, Array, annotations, detections
from benchmarks.side_by_side import Comparison, Scale, alternate
from d3etr.config.data import SplitConfig
from d3etr.data.splits import parse_split
from d3etr.evaluation.coco_metrics import COCO_NAMES, CocoMetrics, GroundTruth, SplitDetections

IMAGES, SMOKE_IMAGES = 5_000, 50
DETECTIONS = 100
"""Of each image."""
ROUNDS = 2
PLAIN, OURS = "pycocotools", "d3etr"
TOLERANCE = 1e-12


def compare(scale: Scale) -> list[Comparison]:
    """Seconds of a whole evaluation, and whether the numbers agree."""
    images = SMOKE_IMAGES if scale.smoke else IMAGES
    random = np.random.default_rng(0)
    content = annotations(images, random)
    rows = detections(content, DETECTIONS, random)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "annotations.json"
        file.write_text(json.dumps(content))
        plain, ours = Plain(file, rows), Ours(file, rows)
    taken = alternate(
        {PLAIN: plain.measure, OURS: ours.measure}, ROUNDS, scale.device, warm_up=scale.smoke
    )
    difference = largest_difference(plain.numbers, ours.numbers)
    objects = len(content["annotations"])
    title = f"Evaluation of {images:,} images, {objects:,} objects, {len(rows):,} detections"
    note = (
        f"Largest difference in the twelve numbers: {difference:.1e} (mAP {ours.numbers[0]:.3f})."
    )
    return [Comparison(title, "seconds", taken, PLAIN, notes=(note,))]


class Plain:
    """pycocotools as its authors show it."""

    def __init__(self, file: Path, rows: Array) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._truth = COCO(str(file))
        self._results = as_results(rows)
        self.numbers: list[float] = []

    def measure(self) -> None:
        """Load, evaluate, accumulate, summarise."""
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._truth, self._truth.loadRes(self._results), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        self.numbers = evaluation.stats.tolist()


class Ours:
    """What a run does at rank 0."""

    def __init__(self, file: Path, rows: Array) -> None:
        split = parse_split("validation", SplitConfig(images=file.parent, annotations=file))
        ids, labels = rows[:, :2].astype(np.int64).T
        self._truth = GroundTruth(split)
        self._found = SplitDetections(ids, labels, rows[:, 2], rows[:, 3:])
        self.numbers: list[float] = []

    def measure(self) -> None:
        """The same numbers."""
        self.numbers = twelve(self._truth.measure(self._found, DETECTIONS))


def as_results(rows: Array) -> list[dict[str, Any]]:
    """Detections as pycocotools takes them."""
    corners, sizes = rows[:, 3:5], rows[:, 5:7] - rows[:, 3:5]
    return [
        {"image_id": int(row[0]), "category_id": CATEGORIES[int(row[1])][0], "score": row[2]}
        | {"bbox": box}
        for row, box in zip(rows.tolist(), np.c_[corners, sizes].tolist(), strict=True)
    ]


def twelve(found: CocoMetrics) -> list[float]:
    """In pycocotools' order, -1 where there are no objects."""
    values = [found.values[name] for name in COCO_NAMES]
    return [-1.0 if value is None else value for value in values]


def largest_difference(plain: list[float], ours: list[float]) -> float:
    """Between the twelve numbers.

    Raises:
        AssertionError: it is too large.
    """
    difference = float(np.abs(np.subtract(plain, ours)).max())
    assert difference <= TOLERANCE, f"twelve numbers differ: {plain} and {ours}"
    return difference
