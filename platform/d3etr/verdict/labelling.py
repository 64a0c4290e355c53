"""The labels of the contender ``pseudo-labels``: what the teacher is sure of, made once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from d3etr.config.location import Location
from d3etr.config.tree import Config
from d3etr.data.splits import DetectionSplit, open_split
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.init_student import build_student
from d3etr.engine.provenance import data_digests, ensure_same_inputs, file_content
from d3etr.errors import UserError
from d3etr.files import clear_disk_errors, read_json, write_text
from d3etr.inference import load
from d3etr.pseudo_labels import (
    Content,
    NoThresholdError,
    best_threshold,
    pseudo_labels,
    require_same_names,
    with_unlabelled_images,
)
from d3etr.timing import seconds_on


@dataclass(frozen=True)
class Labelled:
    """What came of labelling.

    Attributes:
        threshold: lowest score of a label, the best on validation.
        images: that have been looked at.
        boxes: on them.
        seconds: that it took, by the clock of steps.
        inherits: whether the student can start from the teacher's parts.
    """

    threshold: float
    images: int
    boxes: int
    seconds: float
    inherits: bool


def label(config: Config, start: Config, file: Path) -> Labelled | str:
    """Write what the teacher finds on images without labels, unless that was done before.

    Args:
        config: of the distilled student, its paths absolute.
        start: of the student that trains on the file.
        file: to write, on storage that all nodes share.

    Returns:
        What came of it; a text where the teacher finds nothing to choose a threshold by.

    Raises:
        UserError: the file was made by another teacher or of other images, or cannot be made.
    """
    assert config.teacher is not None and config.teacher.weights is not None
    weights = config.teacher.weights
    train, _ = with_unlabelled_images(config.data)
    validation = open_split(config.data, "validation")
    inputs = data_digests(train) | data_digests(validation)
    inputs["teacher.weights"] = file_content(weights) or "missing"
    if file.exists():
        content = read_json(file)
        ensure_same_inputs(content["info"]["inputs"], inputs, file.parent)
    else:
        try:
            content = _content(weights, train, validation, inputs)
        except NoThresholdError as error:
            return str(error)
        with clear_disk_errors("the teacher's labels", file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(content))
    info = content["info"]
    counts = len(content["images"]), len(content["annotations"])
    return Labelled(info["threshold"], *counts, info["seconds"], _can_start(start, train))


def _content(
    weights: Location,
    train: DetectionSplit,
    validation: DetectionSplit,
    inputs: Mapping[str, str],
) -> Content:
    """The file, with how long making it took and what it was made of."""
    device = SingleProcess().device
    begun = seconds_on(device)
    predictor = load(weights, device)
    require_same_names(predictor, train)
    assert train.unlabelled is not None
    threshold, _ = best_threshold(predictor, validation)
    content = pseudo_labels(predictor, train.unlabelled, threshold)
    content["info"] |= {"seconds": seconds_on(device) - begun, "inputs": dict(inputs)}
    return content


def _can_start(config: Config, train: DetectionSplit) -> bool:
    """Whether any part of the teacher fits the student."""
    try:
        build_student(config, train.categories, quiet=True)
    except UserError:
        return False
    return True
