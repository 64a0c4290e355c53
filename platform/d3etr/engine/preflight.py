"""What would keep a run from beginning, found before anything is started or tracked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from d3etr.config.data import DataConfig
from d3etr.config.location import Location
from d3etr.config.tree import Config
from d3etr.data.formats.coco import read_images
from d3etr.data.judgement import (
    Judgement,
    judge,
    judge_against_recipe,
    judge_length,
    judge_unlabelled,
    judge_views,
)
from d3etr.data.splits import (
    SPLIT_NAMES,
    UNLABELLED,
    DetectionSplit,
    open_split,
    read_split,
    unlabelled_place,
)
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.weights import WeightsInfo, load_backbone_weights, read_info
from d3etr.engine.init_student import require_start
from d3etr.engine.provenance import ensure_inputs_answer, weights_of
from d3etr.engine.teacher import (
    check_same_classes,
    check_same_input,
    foundation_folder,
    teacher_boxes,
)
from d3etr.engine.views import require_storable
from d3etr.errors import UserError
from d3etr.methods.base import Method
from d3etr.registry import METHODS
from d3etr.storage.fetch import local_file

DIGIT_CLASSES = 10

Splits = Mapping[str, DetectionSplit]
KnownSplits = dict[tuple[DataConfig, bool], Splits]
"""What runs of equal data read, by data and whether they measure the test split."""


@dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    Attributes:
        images: training images with labels.
        unlabelled: those without that are trained on beside them.
        classes: object classes C.
        teacher: the metadata of its weights file; None without one.
        warnings: what data and recipe could have better.
    """

    images: int
    unlabelled: int
    classes: int
    teacher: WeightsInfo | None
    warnings: tuple[str, ...] = ()


def judge_beginning(config: Config, known: KnownSplits | None = None) -> Beginning:
    """Read what a run begins with: annotations and weights' headers; writes nothing.

    Files that URLs name are fetched into the cache for that, images are not.

    Args:
        config: the run.
        known: splits that were read before, added to; for several runs that share their data.

    Raises:
        UserError: training would be stopped by its images, its weights or its teacher.
    """
    ensure_inputs_answer([config])
    data, known = config.data, {} if known is None else known
    if data.digit_scenes is not None:  # which need not be rendered for this
        splits: Splits = {}
        every, classes = data.digit_scenes.train_images, DIGIT_CLASSES
        images = data.labelled_images(every)
        unlabelled = _unlabelled_beside_scenes(config, every - images)
        if data.unlabelled is not None and data.unlabelled.labels is not None:
            images, unlabelled = images + min(unlabelled, _listed(data.unlabelled.labels)), 0
        judgement = judge_length(config, images) + judge_unlabelled(config, unlabelled)
        judgement += judge_views(config, images, unlabelled)
    else:
        key = (data, config.evaluation.test)
        if key not in known:
            names = SPLIT_NAMES if config.evaluation.test else SPLIT_NAMES[:2]
            known[key] = {name: open_split(data, name, fetch=False) for name in names}
        splits = known[key]
        train = splits["train"]
        images, classes = len(train.records), len(train.categories)
        unlabelled = 0 if train.unlabelled is None else len(train.unlabelled.records)
        judgement = judge(config, splits)
    judgement.raise_errors()
    teacher = _judge_weights(config, splits.get("train"), classes)
    return Beginning(images, unlabelled, classes, teacher, judgement.warnings)


def _unlabelled_beside_scenes(config: Config, rest: int) -> int:
    """Images without labels of a run on digit scenes; of ``rest`` the labels are left out."""
    unlabelled = config.data.unlabelled
    if unlabelled is None or unlabelled.rest_of_train:
        return 0 if unlabelled is None else rest
    if unlabelled.digit_scenes is not None:
        return unlabelled.digit_scenes.train_images
    return len(read_split(UNLABELLED, unlabelled_place(unlabelled), fetch=False).records)


def _listed(labels: Location) -> int:
    """How many images a file lists; those that are none of the run's are known at its start."""
    with local_file(labels) as file:
        return len(read_images(file)[0])


def judge_recipe(config: Config, splits: Splits) -> Judgement:
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
    """The metadata of the teacher's weights, if there is a teacher; tensors are not read.

    Args:
        config: the run.
        train: the training split; None where it is not there yet.
        classes: C; None where that is not known.

    Raises:
        UserError: weights are missing, damaged or of another architecture, or the teacher does
            not fit this data.
    """
    require_start(config)
    for key, file in weights_of(config).items():
        if isinstance(file, Path):
            _ensure_readable(key, file, config)
    if config.teacher is not None and train is not None:
        teacher_boxes(config, train)
    foundation_folder(config)
    if config.teacher is None or config.teacher.weights is None:
        return None
    with local_file(config.teacher.weights) as local:
        info = read_info(local)
    if train is not None:
        check_same_classes(info, config.teacher.weights, train)
    check_same_input(info, config.teacher.weights, config.data)
    if classes is not None:
        method: type[Method] = METHODS.find(config.distillation.method)
        method.check_compatible(
            config.distillation, config.student.detector, info.detector, classes
        )
        if config.teacher.views is not None:
            parts = config.distillation, config.student.detector, info.detector
            require_storable(method(*parts, seed=0), config.teacher.views, info.detector.queries)
    return info


def _ensure_readable(key: str, file: Path, config: Config) -> None:
    if not file.is_file():
        raise UserError(
            f"{key}: there is no file {file.absolute()}. Expected a weights file that a run, "
            "'d3etr import-weights' or 'd3etr pretrain-backbone' has written"
        )
    try:
        if key == "student.backbone_weights":
            load_backbone_weights(build_backbone(config.student.detector.backbone), file)
        else:
            read_info(file)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
