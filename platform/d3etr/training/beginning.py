"""What would keep a run from beginning, found before anything is started or tracked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from d3etr.config.data import DataConfig
from d3etr.config.detector import TeacherConfig
from d3etr.config.tree import Config
from d3etr.data.coco import read_split
from d3etr.detectors.weights import WeightsInfo, read_info
from d3etr.distillation.compatibility import check_compatible
from d3etr.errors import UserError
from d3etr.storage.fetch import local_file
from d3etr.training.inputs import ensure_inputs_answer, weights_of
from d3etr.training.start import ensure_start

DIGIT_CLASSES = 10


@dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    Attributes:
        images: training images.
        classes: object classes C.
        teacher: what its weights file says; None without one.
    """

    images: int
    classes: int
    teacher: WeightsInfo | None


def judge_beginning(config: Config) -> Beginning:
    """Read what a run begins with: annotations and weights' headers; writes nothing.

    Files that URLs name are fetched into the cache for that, images are not.

    Raises:
        UserError: training would be stopped by its images, its weights or its teacher.
    """
    ensure_inputs_answer([config])
    _ensure_weights_exist(config)
    ensure_start(config)
    images, classes = _count(config.data)
    batch_size = config.optimisation.batch_size
    if images < batch_size:
        raise UserError(
            f"the train split has {images} images, fewer than one batch: set "
            f"optimisation.batch_size ({batch_size}) to at most that"
        )
    teacher = None if config.teacher is None else _teacher_info(config.teacher)
    if teacher is not None:
        check_compatible(config.student.detector, teacher.detector, config.distillation, classes)
    return Beginning(images, classes, teacher)


def _ensure_weights_exist(config: Config) -> None:
    for key, file in weights_of(config).items():
        if isinstance(file, Path) and not file.is_file():
            raise UserError(
                f"{key}: there is no file {file.absolute()}. Expected a weights file that a run, "
                "'d3etr import-weights' or 'd3etr pretrain-backbone' has written"
            )


def _count(data: DataConfig) -> tuple[int, int]:
    """Training images and classes; digit scenes need not be rendered for that."""
    if data.digit_scenes is not None:
        return data.digit_scenes.train_images, DIGIT_CLASSES
    assert data.train is not None
    split = read_split("train", data.train, fetch=False)
    return len(split.records), len(split.categories)


def _teacher_info(teacher: TeacherConfig) -> WeightsInfo:
    with local_file(teacher.weights) as file:
        return read_info(file)
