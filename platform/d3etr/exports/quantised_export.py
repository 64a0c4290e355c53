"""Exporting a detector in smaller numbers: as float32, then quantised, then what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from d3etr.data.preprocessing import output_size
from d3etr.data.record_images import record_image
from d3etr.data.splits import DetectionSplit
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.weights import WeightsInfo
from d3etr.errors import UserError
from d3etr.exports.agreement import Agreement, agreement
from d3etr.exports.calibration import SEED, calibration_inputs, chosen
from d3etr.exports.description import Description, Quantisation
from d3etr.exports.export import Export, export_graph, whole_files
from d3etr.exports.graph import GraphSettings
from d3etr.exports.measuring import measure
from d3etr.exports.onnx_file import OnnxFormat
from d3etr.exports.onnx_predictor import OnnxPredictor, load_onnx
from d3etr.exports.pictures import raw_pictures
from d3etr.exports.quantisation import Inputs, quantise
from d3etr.progress import OnProgress, no_progress

_BATCH = 16


@dataclass(frozen=True)
class QuantisedSettings:
    """How a file is quantised and judged.

    Attributes:
        kind: of numbers.
        calibration: images of ``int8-static``, else None.
        evaluated: annotated images, on which the mAP of both files is measured; None: detections
            are counted that only one of both has.
        maximum: detections per image that count for mAP.
    """

    kind: Quantisation
    calibration: DetectionSplit | None = None
    evaluated: DetectionSplit | None = None
    maximum: int = 100


@dataclass(frozen=True)
class QuantisedExport:
    """What was written.

    Attributes:
        float32: the file that was quantised, which is not kept.
        float_bytes: its size.
        description: of the quantised file; its ``quantisation`` says what it cost.
    """

    float32: Export
    float_bytes: int
    description: Description


def export_quantised(
    path: Path,
    detector: DetectionTransformer,
    info: WeightsInfo,
    graph: GraphSettings,
    kind: OnnxFormat,
    settings: QuantisedSettings,
    pictures: Sequence[Path] = (),
    on_progress: OnProgress = no_progress,
) -> QuantisedExport:
    """Write a detector as a quantised ONNX file, whole or not at all.

    The float32 file has to detect what the detector does; what quantisation changes is reported.

    Args:
        path: where to; its folder is made.
        detector: in evaluation mode on the CPU.
        info: describes it.
        graph: its settings.
        kind: of the float32 file.
        settings: of quantisation.
        pictures: to compare by, as of ``export_graph``.
        on_progress: told which step is at work.

    Raises:
        UserError: as of ``export_graph``, or an image cannot be used, or the detector cannot be
            quantised.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_files(path) as temporary:
            source = temporary.with_name("float32.onnx")
            done = export_graph(source, detector, info, graph, kind, pictures, on_progress)
            size, precise = source.stat().st_size, load_onnx(source, "cpu")
            records = [] if settings.calibration is None else chosen(settings.calibration)
            inputs: Iterator[Inputs] = iter(())
            if settings.calibration is not None:
                inputs = calibration_inputs(precise, settings.calibration, records, on_progress)
            on_progress(f"quantising as {settings.kind}")
            how: dict[str, Any] = {"kind": settings.kind}
            if settings.calibration is not None:
                how |= {"calibration_images": len(records), "calibration_seed": SEED}
            description = replace(done.description, quantisation=how, evaluation={})
            quantise(source, settings.kind, temporary, inputs)
            kind.describe(temporary, description)
            quantised = load_onnx(temporary, "cpu")
            description = _judged(description, precise, quantised, settings, pictures, on_progress)
            kind.describe(temporary, description)
            source.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): free some space, or choose "
            "another place"
        ) from error
    return QuantisedExport(done, size, description)


def _judged(
    description: Description,
    precise: OnnxPredictor,
    quantised: OnnxPredictor,
    settings: QuantisedSettings,
    pictures: Sequence[Path],
    on_progress: OnProgress,
) -> Description:
    """With what quantisation cost: mAP of both files, or the share of unmatched detections."""
    how, split = dict(description.quantisation or {}), settings.evaluated
    if split is None:
        about = precise.description
        sized = about.size is not None or about.preprocessing.shortest_side is not None
        found = _agreement(precise, quantised, _shown(settings, pictures, sized))
        how |= {
            "compared_images": found.images,
            "compared_detections": found.detections,
            "unmatched": found.share,
        }
        return replace(description, quantisation=how)
    maps = dict[str, float]()
    for name, predictor in (("float32", precise), (settings.kind, quantised)):
        on_progress(f"measuring {name}")
        metrics = measure(predictor, split, _BATCH, settings.maximum, on_progress).metrics
        value = metrics.values["mAP"]
        if value is None:
            raise UserError(
                f"{split.annotations} annotates no object, so there is no mAP to measure: give "
                "--annotations with objects, or leave it out"
            )
        maps[name] = value
    how |= {
        "mAP": maps[settings.kind],
        "float32_mAP": maps["float32"],
        "images": len(split.records),
    }
    evaluation = {"data_digest": split.digest, "mAP": maps[settings.kind]}
    return replace(description, quantisation=how, evaluation=evaluation)


def _shown(
    settings: QuantisedSettings, pictures: Sequence[Path], sized: bool
) -> Iterator[Image.Image]:
    """Pictures to compare by: those given, else those calibrated on, else photographs."""
    split = settings.calibration
    if pictures or split is None:
        return iter(raw_pictures(pictures, sized))
    return (record_image(split, record) for record in chosen(split))


def _agreement(
    precise: OnnxPredictor, quantised: OnnxPredictor, pictures: Iterator[Image.Image]
) -> Agreement:
    """Over the detections that ``predict`` shows; small pictures are left out."""
    total = Agreement()
    about = precise.description
    for picture in pictures:
        size = output_size(picture.width, picture.height, about.preprocessing)
        if min(size) < about.smallest:
            continue
        (one,), (other,) = precise.predict(picture), quantised.predict(picture)
        total += agreement((one.boxes_xyxy, one.labels), (other.boxes_xyxy, other.labels))
    return total


def as_json(done: QuantisedExport) -> Mapping[str, Any]:
    """Plain values: what the file says about its quantisation, and the size of the float32 one."""
    return {"float32_bytes": done.float_bytes, **(done.description.quantisation or {})}
