"""Finished runs, measured on one split and held against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from d3etr.config.location import Location
from d3etr.config.tree import Config
from d3etr.data.splits import open_split
from d3etr.detectors.weights import load_weights
from d3etr.engine.distributed import SingleProcess
from d3etr.evaluation.coco_metrics import GroundTruth, SplitDetections
from d3etr.evaluation.evaluator import Evaluator
from d3etr.evaluation.judge import Contender, Judgement, judge
from d3etr.storage.fetch import local_file
from d3etr.verdict.contenders import DISTILLED

SplitName = Literal["validation", "test"]


@dataclass(frozen=True)
class Trained:
    """The finished runs of a contender.

    Attributes:
        name: of the contender.
        distilled: whether a teacher took part.
        validation: [S] mAP on validation.
        weights: S files.
    """

    name: str
    distilled: bool
    validation: tuple[float, ...]
    weights: tuple[Path, ...]


def judge_runs(config: Config, split: SplitName, trained: Sequence[Trained]) -> Judgement:
    """Detect with all weights and, on images as large as it sees them, the teacher, and judge.

    Args:
        config: of the distilled student, its paths absolute.
        split: that is judged on.
        trained: every contender.

    Raises:
        UserError: weights or images are gone, or too few runs.
    """
    context = SingleProcess()
    images = open_split(config.data, split)
    asked = images, config.data, config.evaluation, context
    students, scale = Evaluator(*asked), config.teacher_scale
    teachers = students if scale == 1 else Evaluator(*asked, scale)

    def detections(weights: Location, evaluator: Evaluator = students) -> SplitDetections:
        with local_file(weights) as file:
            detector, _ = load_weights(file)
        return evaluator.detect(detector.to(context.device))

    contenders = [
        Contender(
            each.name,
            each.distilled,
            each.validation,
            tuple(detections(file) for file in each.weights),
        )
        for each in trained
    ]
    weights = None if config.teacher is None else config.teacher.weights
    teacher = None if weights is None else detections(weights, teachers)
    maximum = config.evaluation.maximum_detections
    return judge(GroundTruth(images), contenders, teacher, recipe=DISTILLED, maximum=maximum)
