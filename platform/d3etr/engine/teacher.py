"""Whether a teacher is fit to teach on this data, settled before the first step."""

from __future__ import annotations

from d3etr.config.data import DataConfig
from d3etr.config.detector import TeacherConfig
from d3etr.config.location import Location
from d3etr.data.splits import DetectionSplit
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.weights import WeightsInfo
from d3etr.distiller import Distiller
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
    raise UserError(
        f"teacher.weights {weights} has other classes than {split.annotations}: "
        f"{_differences(theirs, ours)}. Expected the same names in the same order: use a "
        "teacher that was trained on these categories"
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


def recorded_mAP(info: WeightsInfo, evaluator: Evaluator, data: DataConfig) -> float | None:
    """The mAP in the weights file, if it was measured on these images in this form."""
    record = info.evaluation or {}
    same_data = record.get("data_digest") == evaluator.split.digest
    if not same_data or info.preprocessing != data.preprocessing:
        return None
    mAP = record.get("mAP")
    return float(mAP) if isinstance(mAP, int | float) else None


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
        info: what its weights file says.
        config: the minimum, and whether a recorded evaluation counts.
        data: as the run sees it.
        evaluator: of the validation split.

    Returns:
        Its mAP (None if the validation split holds no objects) and how that is known,
        ``recorded`` or ``measured``.

    Raises:
        UserError: it is below ``teacher.minimum_mAP``.
    """
    how = "recorded"
    mAP = recorded_mAP(info, evaluator, data) if config.evaluation == "verify" else None
    if mAP is None:
        how, mAP = "measured", evaluator.measure(teacher).mAP
    if (mAP or 0.0) < config.minimum_mAP:
        said = "nothing, as it holds no objects" if mAP is None else f"{100 * mAP:.1f} mAP"
        raise UserError(
            f"teacher.weights {config.weights} reaches {said} ({how}) on "
            f"{evaluator.split.annotations}, below teacher.minimum_mAP "
            f"{100 * config.minimum_mAP:.1f}: a worse teacher teaches its mistakes. Use a "
            "better one, or lower teacher.minimum_mAP"
        )
    return mAP, how


def _differences(theirs: list[str], ours: list[str]) -> str:
    only_theirs = [name for name in theirs if name not in ours]
    only_ours = [name for name in ours if name not in theirs]
    parts = []
    if only_theirs:
        parts.append(f"only the teacher has {_some(only_theirs)}")
    if only_ours:
        parts.append(f"only the data has {_some(only_ours)}")
    if not parts and sorted(theirs) == sorted(ours):
        k = next(k for k, pair in enumerate(zip(theirs, ours, strict=True)) if len({*pair}) > 1)
        parts.append(f"another order: class {k} is '{theirs[k]}' there and '{ours[k]}' here")
    return "; ".join(parts) or f"{len(theirs)} classes against {len(ours)}, with repeated names"


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + rest


def idle_settings(config: TeacherConfig | None, distiller: Distiller) -> list[str]:
    """Settings of how the teacher runs that are set where it never runs in training."""
    if config is None or distiller.method.needs_teacher_outputs:
        return []
    return [] if config.precision is None else ["teacher.precision"]
