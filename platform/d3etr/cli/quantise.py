"""``d3etr export --quantise``: its arguments, and what it answers."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from d3etr.cli.command import location
from d3etr.cli.splits import evaluated_split
from d3etr.exports.description import Quantisation

if TYPE_CHECKING:
    from d3etr.data.splits import DetectionSplit
    from d3etr.detectors.weights import WeightsInfo
    from d3etr.exports.quantised_export import QuantisedExport, QuantisedSettings
    from d3etr.progress import OnProgress

CALIBRATED = "int8-static"
LAST_OPSET = 20
"""Later ones have GroupNormalization, whose outputs ONNX infers no type of."""
ARGUMENTS = ("calibration", "annotations", "images")
"""Those that go with ``--quantise`` alone."""


def add_quantise_arguments(parser: ArgumentParser) -> None:
    """``--quantise`` and what goes with it."""
    group = parser.add_argument_group("quantisation", "for --format onnx")
    group.add_argument(
        "--quantise",
        choices=get_args(Quantisation),
        help="int8-dynamic: matrices in 8 bits; int8-static: convolutions too, with ranges from "
        "--calibration; float16: for GPUs. What it costs is reported and stored",
    )
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="IMAGES_OR_ANNOTATIONS",
        help="of int8-static: a folder of images, or a COCO file of images in --images; training "
        "images are right, 100 of them are taken",
    )
    group.add_argument(
        "--annotations",
        type=location,
        metavar="FILE",
        help="measure mAP before and after on these images, given as to d3etr evaluate; without it "
        "unmatched detections are counted",
    )
    group.add_argument(
        "--images", type=location, metavar="FOLDER", help="where COCO's images are: folder or URL"
    )


def refuse_without_effect(options: Namespace, onnx: bool) -> None:
    """End the program, as a wrong argument does, for what has no effect or lacks something."""
    if options.quantise is not None and not onnx:
        options.refuse(f"--quantise goes with --format onnx, not with {options.format}")
    if options.quantise is not None and (options.opset or 0) > LAST_OPSET:
        options.refuse(
            f"--quantise goes with --opset up to {LAST_OPSET}: ONNX Runtime's tools cannot infer "
            "types of later operators"
        )
    for name in ARGUMENTS:
        if getattr(options, name) is not None and options.quantise is None:
            options.refuse(f"--{name} goes with --quantise")
    static, given = options.quantise == CALIBRATED, options.calibration
    if static and given is None:
        options.refuse(f"--quantise {CALIBRATED} needs --calibration: a folder of typical images")
    if given is not None and not static:
        options.refuse(f"--calibration goes with --quantise {CALIBRATED}: no other has ranges")
    if options.images is not None and options.annotations is None and _is_folder(given):
        options.refuse("--images goes with --annotations, or a COCO file as --calibration")


def _is_folder(path: Path | None) -> bool:
    return path is None or path.is_dir()


def quantised_settings(
    options: Namespace, info: WeightsInfo, progress: OnProgress
) -> QuantisedSettings:
    """What the arguments ask for, with the images that they name.

    Raises:
        UserError: images or annotations cannot be used, or are of other classes.
    """
    from d3etr.config.training import EvaluationConfig
    from d3etr.exports.quantised_export import QuantisedSettings

    evaluated = None
    if options.annotations is not None:
        names = [name for _, name in info.categories]
        evaluated = evaluated_split(options, ("images", "annotations"), names, progress)
    return QuantisedSettings(
        options.quantise,
        _calibration(options, progress),
        evaluated,
        EvaluationConfig().maximum_detections,
    )


def _calibration(options: Namespace, progress: OnProgress) -> DetectionSplit | None:
    from d3etr.config.data import SplitConfig
    from d3etr.data.splits import UNLABELLED, Keys, read_split
    from d3etr.errors import UserError

    place = options.calibration
    if place is None:
        return None
    if not place.exists():
        raise UserError(f"--calibration: {place} does not exist; expected images, or a COCO file")
    if not place.is_dir() and options.images is None:
        raise UserError(
            f"--calibration: {place} is a file, and --images is missing: name the folder that its "
            "file names are relative to, or give --calibration a folder of images"
        )
    images = place if place.is_dir() else options.images
    config = SplitConfig(images=images, annotations=place, format="coco")
    keys = Keys("--calibration" if place.is_dir() else "--images", "--calibration")
    return read_split(UNLABELLED, config, progress, keys=keys)


def in_words(done: QuantisedExport, size: int) -> str:
    """A few lines: sizes, and what quantisation cost."""
    found: dict[str, Any] = dict(done.description.quantisation or {})
    kind = found["kind"]
    lines = [f"{kind}: {size / 1e6:.2f} MB, as float32 {done.float_bytes / 1e6:.2f} MB"]
    if "calibration_images" in found:
        lines.append(f"calibrated on {found['calibration_images']} images")
    if "mAP" in found:
        before, after = 100 * found["float32_mAP"], 100 * found["mAP"]
        lines.append(
            f"mAP on {found['images']} images: float32 {before:.1f} %, {kind} {after:.1f} % "
            f"({after - before:+.1f})"
        )
        return "\n".join(lines)
    shown, count = found["compared_images"], found["compared_detections"]
    share = found["unmatched"]
    if share is None:
        lines.append(f"nothing was detected in {shown} pictures: give --pictures with objects")
    else:
        lines.append(
            f"{100 * share:.1f} % of {count} detections in {shown} pictures are one file's only"
        )
    lines.append("measure what it costs: --annotations FILE --images FOLDER, or d3etr evaluate")
    return "\n".join(lines)
