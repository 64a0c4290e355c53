"""``d3etr evaluate``: COCO's numbers of a weights file on an annotated image set."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from d3etr.cli.command import (
    Command,
    add_device,
    add_json,
    add_weights,
    answer,
    complain,
    ensure_writable,
    file_to_write,
    location,
    positive,
    whole_number,
    writing,
)
from d3etr.cli.progress import progress_bar
from d3etr.cli.splits import evaluated_split, split_config
from d3etr.files import write_whole
from d3etr.text import printable

if TYPE_CHECKING:
    from d3etr.data.splits import DetectionSplit
    from d3etr.evaluation.evaluator import Observer
    from d3etr.structures import DecoderOutputs, ImageBatch, Targets

WRITTEN = 300
"""Detections of an image that ``--write-detections`` writes."""
_SPLIT = ("images", "annotations", "format", "subset", "follow_links")
"""Arguments that say where the images are."""


def _add_arguments(parser: ArgumentParser) -> None:
    add_weights(parser, ", an ONNX file of d3etr export")
    parser.add_argument(
        "--annotations",
        type=location,
        required=True,
        metavar="FILE",
        help="COCO detection JSON or its URL; YOLO data.yaml, Pascal VOC or image folder",
    )
    parser.add_argument(
        "--images",
        type=location,
        metavar="FOLDER",
        help="where COCO's images are: a folder or a URL",
    )
    parser.add_argument(
        "--format", default="auto", metavar="NAME", help="of the annotations (default: recognised)"
    )
    parser.add_argument(
        "--subset",
        metavar="NAME",
        help="part of a data set in one folder, such as test (default val)",
    )
    parser.add_argument(
        "--follow-links", action="store_true", help="links may lead out of the image folder"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="images at once (default 16)"
    )
    parser.add_argument(
        "--workers",
        type=whole_number(0, 64),
        metavar="N",
        help="loading processes (default 1); an ONNX file is measured in this one alone",
    )
    parser.add_argument(
        "--write-detections",
        type=file_to_write(".json"),
        metavar="FILE",
        help=f"write the {WRITTEN} most certain detections of each image as COCO results, for "
        "teacher.detections",
    )
    add_device(parser)
    add_json(parser)


def _run(options: Namespace) -> int:
    result = _measure(options)
    answer(options, result, lambda: _print(result))
    return 0


def _print(result: Mapping[str, Any]) -> None:
    from d3etr.evaluation.coco_metrics import COCO_NAMES

    print(f"{result['images']} images, {result['images_per_second']:.1f} images/s")
    metrics = dict(result["metrics"])
    for name in COCO_NAMES:
        value = metrics.pop(name, None)
        print(f"{name:<12}{'no such objects' if value is None else f'{100 * value:5.1f} %'}")
    for name, value in metrics.items():
        print(f"  {printable(name):<24}{100 * value:5.1f} %")


def _measure(options: Namespace) -> dict[str, Any]:
    """Evaluate in this process; values are fractions."""
    from d3etr.loading import is_onnx

    if options.write_detections is not None:
        ensure_writable(options.write_detections)
    return _measure_onnx(options) if is_onnx(options.weights) else _measure_weights(options)


def _measure_onnx(options: Namespace) -> dict[str, Any]:
    """An exported detector's; images of one size go together, loaded in this process."""
    from d3etr.config.arguments import require_path
    from d3etr.config.training import EvaluationConfig
    from d3etr.exports.measuring import measure
    from d3etr.exports.onnx_predictor import load_onnx

    if options.workers is not None:
        complain("warning: --workers has no effect on an ONNX file: images are loaded in turn")
    predictor = load_onnx(require_path("WEIGHTS", options.weights), options.device)
    most = EvaluationConfig().maximum_detections
    with progress_bar() as progress:
        split = evaluated_split(options, _SPLIT, predictor.description.names, progress)
        measured = measure(predictor, split, options.batch_size, most, progress)
    if options.write_detections is not None:
        columns = (x.tolist() for x in vars(measured.detections).values())
        ids = [category.id for category in split.categories]
        written = [
            _as_result(number, ids[label], score, box)
            for number, label, score, box in zip(*columns, strict=True)
        ]
        with writing(options.write_detections):
            write_whole(options.write_detections, json.dumps(written))
    speed, metrics = measured.images_per_second, measured.metrics.as_dict()
    return _result(options, split, speed, metrics)


def _result(
    options: Namespace, split: DetectionSplit, speed: float, metrics: Mapping[str, float]
) -> dict[str, Any]:
    return {
        "weights": str(options.weights),
        "annotations": str(options.annotations),
        "data_digest": split.digest,
        "images": len(split.records),
        "images_per_second": speed,
        "metrics": metrics,
    }


def _measure_weights(options: Namespace) -> dict[str, Any]:
    from d3etr.config.data import DataConfig
    from d3etr.config.training import EvaluationConfig
    from d3etr.engine.distributed import SingleProcess
    from d3etr.evaluation.evaluator import Evaluator
    from d3etr.loading import load_weights_file

    predictor = load_weights_file(options.weights, options.device)
    place = split_config(options, _SPLIT)
    names = [name for _, name in predictor.info.categories]
    with progress_bar() as progress:
        split = evaluated_split(options, _SPLIT, names, progress)
    data = DataConfig(
        train=place,
        validation=place,
        preprocessing=predictor.info.preprocessing,
        workers=1 if options.workers is None else options.workers,
    )
    context = SingleProcess(predictor.device)
    evaluator = Evaluator(split, data, EvaluationConfig(batch_size=options.batch_size), context)
    written: list[dict[str, Any]] = []
    observe = None
    if options.write_detections is not None:
        observe = _collector(written, [category.id for category in split.categories])
    evaluation = evaluator.measure(predictor.detector, observe)
    if options.write_detections is not None:
        with writing(options.write_detections):
            write_whole(options.write_detections, json.dumps(written))
    return _result(options, split, evaluation.images_per_second, evaluation.as_dict())


def _collector(written: list[dict[str, Any]], ids: Sequence[int]) -> Observer:
    """Adds what is detected in each batch to ``written``, with the annotations' ids of classes."""
    from d3etr.evaluation.postprocess import top_detections

    def collect(images: ImageBatch, targets: Targets, outputs: DecoderOutputs) -> None:
        found = [x.tolist() for x in top_detections(outputs, targets.original_sizes, WRITTEN)]
        for number, scores, labels, boxes in zip(targets.image_ids, *found, strict=True):
            written.extend(
                _as_result(number, ids[label], score, box)
                for score, label, box in zip(scores, labels, boxes, strict=True)
            )

    return collect


def _as_result(number: int, category: int, score: float, box: Sequence[float]) -> dict[str, Any]:
    """A detection as COCO's results have it."""
    x, y, right, bottom = box
    return {
        "image_id": number,
        "category_id": category,
        "bbox": [x, y, right - x, bottom - y],
        "score": score,
    }


COMMAND = Command(
    "evaluate", "measure weights on annotated images (COCO mAP)", _add_arguments, _run
)
