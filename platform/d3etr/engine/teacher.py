"""Whether a teacher fits the data and is good enough, settled before the first step."""

from __future__ import annotations

from itertools import zip_longest

from d3etr.config.data import DataConfig
from d3etr.config.detector import TeacherConfig
from d3etr.config.location import Location
from d3etr.config.tree import Config
from d3etr.data.splits import DetectionSplit
from d3etr.data.teacher_boxes import FoundBoxes, read_teacher_boxes
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.foundation import require_transformers
from d3etr.detectors.foundation_folder import FoundationFolder, read_foundation_folder
from d3etr.detectors.weights import WeightsInfo
from d3etr.errors import UserError
from d3etr.evaluation.evaluator import Evaluator

_SHOWN = 5


def check_same_classes(info: WeightsInfo, weights: Location, split: DetectionSplit) -> None:
    """Check that label k means the same to the teacher and in the data.

    Ids may differ, names and their order may not.

    Raises:
        UserError: lists the differences.
    """
    theirs = [name for _, name in info.categories]
    ours = [category.name for category in split.categories]
    if theirs == ours:
        return
    parts = [
        f"only {who} has {', '.join(repr(name) for name in names[:_SHOWN])}"
        + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for who, names in (
            ("the teacher", [name for name in theirs if name not in ours]),
            ("the data", [name for name in ours if name not in theirs]),
        )
        if names
    ]
    if not parts:
        pairs = enumerate(zip_longest(theirs, ours))
        k, (there, here) = next((k, pair) for k, pair in pairs if pair[0] != pair[1])
        parts = [f"another order: class {k} is '{there}' there and '{here}' here"]
    hint = ""
    if len(theirs) == len(ours) and {*theirs} != {*ours}:
        hint = (
            ", or import it again with 'd3etr import-weights --categories' and the annotation file "
            "that it learnt from, if it calls the same classes by other names"
        )
    raise UserError(
        f"teacher.weights {weights} has other classes than {split.annotations}: "
        f"{'; '.join(parts)}. Expected the same names in the same order: use a teacher that was "
        f"trained on these categories{hint}"
    )


def check_same_input(info: WeightsInfo, weights: Location, data: DataConfig) -> None:
    """Check that the teacher can use the images as the student gets them.

    Raises:
        UserError: the teacher expects another normalisation.
    """
    theirs, ours = info.preprocessing.normalisation, data.preprocessing.normalisation
    if theirs != ours:
        raise UserError(
            f"teacher.weights {weights} expects images with normalisation '{theirs}', but "
            f"data.preprocessing.normalisation is '{ours}': set it to '{theirs}', both "
            "detectors see the same images"
        )


def teacher_boxes(config: Config, split: DetectionSplit) -> tuple[FoundBoxes, ...] | None:
    """What a teacher in files has found in each training image; None where it is a network.

    Raises:
        UserError: see ``read_teacher_boxes``.
    """
    method = config.distillation
    if config.teacher is None or config.teacher.detections is None:
        return None
    least: float = getattr(method, "minimum_score", 0.0)
    return read_teacher_boxes(config.teacher.detections, split, least)


def foundation_folder(config: Config) -> FoundationFolder | None:
    """What the folder of a foundation model that teaches says; None where none does.

    Raises:
        UserError: see ``read_foundation_folder``, or there is nothing to load the model with.
    """
    if config.teacher is None or config.teacher.features is None:
        return None
    require_transformers()
    return read_foundation_folder(config.teacher.features)


def licence_of(folder: FoundationFolder) -> str:
    """What is known of a foundation model's licence, a sentence for people."""
    if folder.licence is not None:
        return f"teacher.features {folder.path}: licence {folder.licence}"
    return (
        f"teacher.features {folder.path}: no licence found (README.md's front matter, LICENSE): "
        "look up what the model may be used for"
    )


def qualify_teacher(
    teacher: DetectionTransformer,
    info: WeightsInfo,
    config: TeacherConfig,
    data: DataConfig,
    evaluator: Evaluator,
) -> tuple[float | None, str]:
    """Make sure that the teacher is good enough.

    Args:
        teacher: on the worker's device.
        info: the metadata of its weights file.
        config: the minimum, and whether a recorded evaluation counts.
        data: as the run sees it.
        evaluator: of the validation split, with images as large as the teacher sees them.

    Returns:
        Its mAP (None if the validation split holds no objects) and how that is known,
        ``recorded`` or ``measured``.

    Raises:
        UserError: it is below ``teacher.minimum_mAP``.
    """
    how, mAP = "recorded", None
    record = info.evaluation or {}
    same_data = record.get("data_digest") == evaluator.split.digest
    same_size = info.preprocessing == data.preprocessing.scaled(config.image_scale)
    if config.evaluation == "verify" and same_data and same_size:
        mAP = record.get("mAP")
    if not isinstance(mAP, int | float):
        how, mAP = "measured", evaluator.measure(teacher).mAP
    if (mAP or 0.0) < config.minimum_mAP:
        reached = "nothing, as it holds no objects" if mAP is None else f"{100 * mAP:.1f} mAP"
        raise UserError(
            f"teacher.weights {config.weights} reaches {reached} ({how}) on "
            f"{evaluator.split.annotations}, below teacher.minimum_mAP "
            f"{100 * config.minimum_mAP:.1f}: a student learns its teacher's mistakes. Use a "
            "better one, or lower teacher.minimum_mAP"
        )
    return mAP, how
