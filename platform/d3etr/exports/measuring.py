"""COCO's numbers of an exported detector; PyTorch is not needed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d3etr.data.preprocessing import output_size
from d3etr.data.record_images import naming, record_image
from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit
from d3etr.evaluation.coco_metrics import CocoMetrics, GroundTruth, SplitDetections
from d3etr.exports.onnx_predictor import OnnxPredictor
from d3etr.predictions import of_one_size
from d3etr.progress import OnProgress


@dataclass(frozen=True)
class Measured:
    """Of an exported detector on one split.

    Attributes:
        metrics: COCO's.
        images_per_second: of the runtime alone.
        detections: all that the file gives, K of each image.
    """

    metrics: CocoMetrics
    images_per_second: float
    detections: SplitDetections


def measure(
    predictor: OnnxPredictor,
    split: DetectionSplit,
    batch_size: int,
    maximum: int,
    on_progress: OnProgress,
) -> Measured:
    """Evaluate on a split.

    Images of one size go together, without padding: numbers are those of the detector in PyTorch
    where its batches have none.

    Args:
        predictor: of the file.
        split: images and objects.
        batch_size: images at once.
        maximum: detections per image that count.
        on_progress: told how many images are done.

    Raises:
        UserError: an image is missing, damaged or too small for the graph.
    """
    numbers, parts, counting, seconds, seen = [], [], [], 0.0, 0
    for number, records in enumerate(_batches(predictor, split, batch_size)):
        images = [_prepared(predictor, split, record) for record in records]
        sizes = [(record.height, record.width) for record in records]
        begin = time.perf_counter()
        parts.append(predictor.detect_all(images, sizes))
        if number:  # the first batch warms up
            seconds, seen = seconds + time.perf_counter() - begin, seen + len(records)
        numbers += [record.id for record in records]
        counting.append(parts[-1][1].shape)
        on_progress("images", len(numbers), len(split.records))
    boxes, scores, labels = (
        np.concatenate([part[place].reshape(-1, *part[place].shape[2:]) for part in parts])
        for place in range(3)
    )
    each = np.concatenate([np.full(count, most) for count, most in counting])
    ids = np.repeat(np.array(numbers, dtype=np.int64), each)
    found = SplitDetections(ids, labels, scores.astype(np.float64), boxes.astype(np.float64))
    # Of each image the best ones alone, as of a detector that is asked for so many.
    rank = np.concatenate([np.arange(count) for count in each])
    best = SplitDetections(*(x[rank < maximum] for x in vars(found).values()))
    metrics = GroundTruth(split).measure(best, maximum)
    return Measured(metrics, seen / max(seconds, 1e-9), found)


def _prepared(
    predictor: OnnxPredictor, split: DetectionSplit, record: ImageRecord
) -> NDArray[np.uint8]:
    image = record_image(split, record)
    with naming(split, record):
        return predictor.prepared(image)


def _batches(
    predictor: OnnxPredictor, split: DetectionSplit, batch_size: int
) -> Iterator[list[ImageRecord]]:
    rule = predictor.description.preprocessing
    shapes = []
    for record in split.records:
        with naming(split, record):
            shapes.append(output_size(record.width, record.height, rule))
    for indices in of_one_size(shapes):
        for begin in range(0, len(indices), batch_size):
            yield [split.records[index] for index in indices[begin : begin + batch_size]]
