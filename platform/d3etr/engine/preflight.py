"""What would keep a run from beginning, found before anything is started or tracked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from d3etr.config.data import DataConfig
from d3etr.config.tree import Config
from d3etr.data.judgement import Judgement, judge, judge_against_recipe, judge_length
from d3etr.data.splits import SPLIT_NAMES, DetectionSplit, open_split
from d3etr.detectors.weights import WeightsInfo, read_info
from d3etr.engine.init_student import ensure_start
from d3etr.engine.provenance import ensure_inputs_answer, weights_of
from d3etr.engine.teacher import check_same_classes, check_same_input
from d3etr.errors import UserError
from d3etr.methods.base import Method
from d3etr.registry import METHODS
from d3etr.storage.fetch import local_file

DIGIT_CLASSES = 10


@dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    Attributes:
        images: training images.
        classes: object classes C.
        teacher: what its weights file says; None without one.
        warnings: what data and recipe could have better.
    """

    images: int
    classes: int
    teacher: WeightsInfo | None
    warnings: tuple[str, ...] = ()


Splits = Mapping[str, DetectionSplit]


def judge_beginning(config: Config, read: Callable[[Config], Splits] | None = None) -> Beginning:
    """Read what a run begins with: annotations and weights' headers; writes nothing.

    Files that URLs name are fetched into the cache for that, images are not.

    Args:
        config: the run.
        read: what ``SplitReader`` gives, where several runs share their data.

    Raises:
        UserError: training would be stopped by its images, its weights or its teacher.
    """
    ensure_inputs_answer([config])
    splits = (read or _read_splits)(config)
    images, classes = _count(config.data, splits)
    judgement = judge(config, splits) if splits else judge_length(config, images)
    judgement.raise_errors()
    teacher = _judge_weights(config, splits.get("train"), classes)
    return Beginning(images, classes, teacher, judgement.warnings)


def judge_recipe(config: Config, splits: Mapping[str, DetectionSplit]) -> Judgement:
    """Judge a recipe, its weights included, against the splits that could be read."""
    judgement, train = judge_against_recipe(config, splits), splits.get("train")
    try:
        _judge_weights(config, train, None if train is None else len(train.categories))
    except UserError as error:
        judgement += Judgement(errors=(str(error),))
    return judgement


def _judge_weights(
    config: Config, train: DetectionSplit | None, classes: int | None
) -> WeightsInfo | None:
    """What the teacher's file says, if there is a teacher; tensors are not read.

    Args:
        config: the run.
        train: what is learnt; None where that is not there yet.
        classes: C; None where that is not known.

    Raises:
        UserError: weights are missing, or the teacher cannot teach on this data.
    """
    _ensure_weights_exist(config)
    ensure_start(config)
    if config.teacher is None:
        return None
    with local_file(config.teacher.weights) as file:
        info = read_info(file)
    if train is not None:
        check_same_classes(info, config.teacher.weights, train)
    check_same_input(info, config.teacher.weights, config.data)
    if classes is not None:
        method: type[Method] = METHODS.find(config.distillation.method)
        method.check_compatible(
            config.distillation, config.student.detector, info.detector, classes
        )
    return info


def _ensure_weights_exist(config: Config) -> None:
    for key, file in weights_of(config).items():
        if isinstance(file, Path) and not os.path.isfile(file):
            raise UserError(
                f"{key}: there is no file {file.absolute()}. Expected a weights file that a run, "
                "'d3etr import-weights' or 'd3etr pretrain-backbone' has written"
            )


def _read_splits(config: Config) -> Splits:
    """What the run would read; nothing of digit scenes, which need not be rendered."""
    if config.data.digit_scenes is not None:
        return {}
    names = SPLIT_NAMES if config.evaluation.test else SPLIT_NAMES[:2]
    return {name: open_split(config.data, name, fetch=False) for name in names}


class SplitReader:
    """Reads the splits of several runs, those of equal data once."""

    def __init__(self) -> None:
        self._known: dict[tuple[DataConfig, bool], Splits] = {}

    def __call__(self, config: Config) -> Splits:
        """The splits that a run would read; see ``judge_beginning``."""
        key = (config.data, config.evaluation.test)
        if key not in self._known:
            self._known[key] = _read_splits(config)
        return self._known[key]


def _count(data: DataConfig, splits: Splits) -> tuple[int, int]:
    """Training images and classes."""
    if data.digit_scenes is not None:
        return data.digit_scenes.train_images, DIGIT_CLASSES
    return len(splits["train"].records), len(splits["train"].categories)
