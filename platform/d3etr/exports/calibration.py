"""Images by which the ranges of an exported file's activations are measured."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from d3etr.data.record_images import naming, record_image
from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit
from d3etr.exports.inputs import graph_inputs
from d3etr.exports.onnx_predictor import OnnxPredictor
from d3etr.progress import OnProgress, no_progress

IMAGES = 100
"""Calibrated on, at most; our choice."""
SEED = 0
"""Of their choice."""


def chosen(split: DetectionSplit) -> list[ImageRecord]:
    """At most ``IMAGES`` records at random, the same ones each time."""
    records = split.records
    return random.Random(SEED).sample(records, min(IMAGES, len(records)))


def calibration_inputs(
    predictor: OnnxPredictor,
    split: DetectionSplit,
    records: Sequence[ImageRecord],
    on_progress: OnProgress = no_progress,
) -> Iterator[dict[str, NDArray[Any]]]:
    """Inputs of the graph, an image each, as the file is given them when it detects.

    Args:
        predictor: of the float32 file.
        split: that the records are of.
        records: images.
        on_progress: told how many are read.

    Raises:
        UserError: an image is missing, damaged or too small for the graph.
    """
    for number, record in enumerate(records, start=1):
        image = record_image(split, record)
        with naming(split, record):
            pixels = predictor.prepared(image)
        yield graph_inputs(predictor.description, [pixels], [(record.height, record.width)])
        on_progress("calibration images", number, len(records))
