"""Hard pseudo-labels: a detector's confident detections, written as a COCO file to train on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d3etr.data.annotations import Category
from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit
from d3etr.errors import UserError
from d3etr.evaluation.coco_metrics import GroundTruth, SplitDetections
from d3etr.inference import Detections, Predictor
from d3etr.progress import OnProgress, no_progress

BATCH = 32
"""Images that go through the detector together."""
_MAXIMUM = 100
"""Detections of an image that count where a threshold is chosen."""

Content = dict[str, Any]


def best_threshold(
    predictor: Predictor, split: DetectionSplit, on_progress: OnProgress = no_progress
) -> tuple[float, float]:
    """The score that separates right detections from wrong ones best on annotated images.

    Args:
        predictor: the detector.
        split: images that it has not learnt from.
        on_progress: called with how many images are done.

    Returns:
        The threshold, and F1 of the detections above it: at IoU 0.5, all classes together.

    Raises:
        UserError: the classes differ, an image cannot be read, or there is no object.
    """
    _require_same_names(predictor, split)
    labels = {category.id: label for label, category in enumerate(_categories(predictor))}
    ids, found_labels, scores, boxes = [], [], [], []
    for record, found in _detections(predictor, split, 0.0, on_progress):
        ids += [record.id] * len(found)
        found_labels += [labels[number] for number in found.labels.tolist()]
        scores.append(found.scores)
        boxes.append(found.boxes_xyxy)
    detections = SplitDetections(
        np.array(ids, dtype=np.int64),
        np.array(found_labels, dtype=np.int64),
        np.concatenate(scores).astype(np.float64),
        np.concatenate(boxes).astype(np.float64),
    )
    best = GroundTruth(split).best_threshold(detections, _MAXIMUM)
    if best is None:
        raise UserError(
            f"{split.annotations}: no detection is right, so no threshold is best: expected images "
            "with objects that the detector finds, or give --threshold a number"
        )
    return best


def pseudo_labels(
    predictor: Predictor,
    images: DetectionSplit,
    labelled: DetectionSplit | None,
    threshold: float,
    on_progress: OnProgress = no_progress,
) -> tuple[Content, Path]:
    """A COCO file's content: detections of at least ``threshold``, beside the labels there are.

    Args:
        predictor: the detector.
        images: what it looks at; annotations are not used.
        labelled: images whose annotations are taken over; its class ids are the file's.
        threshold: lowest score.
        on_progress: called with how many images are done.

    Returns:
        The content, every detection with its ``score``, and the folder that its file names are
        relative to.

    Raises:
        UserError: classes differ, or an image cannot be read.
    """
    splits = [images] if labelled is None else [labelled, images]
    folder = _common_folder(splits)
    categories = _categories(predictor)
    if labelled is not None:
        _require_same_names(predictor, labelled)
        categories = labelled.categories
    ids = dict(zip((c.id for c in _categories(predictor)), categories, strict=True))
    content: Content = {
        "info": {"description": "pseudo-labels", "threshold": threshold},
        "images": [],
        "annotations": [],
        "categories": [{"id": c.id, "name": c.name} for c in categories],
    }
    for record in () if labelled is None else labelled.records:
        assert labelled is not None
        _add_image(content, labelled, record, folder)
        rows = zip(record.labels, record.boxes_xywh, record.areas, record.crowd, strict=True)
        for label, box, area, crowd in rows:
            about = {"area": float(area), "iscrowd": int(crowd)}
            _add_object(content, categories[label].id, box.tolist(), about)
    for record, found in _detections(predictor, images, threshold, on_progress):
        _add_image(content, images, record, folder)
        for label, score, corners in zip(
            found.labels, found.scores, found.boxes_xyxy.tolist(), strict=True
        ):
            left, top, right, bottom = corners
            width, height = right - left, bottom - top
            if width > 0 and height > 0:
                about = {"area": width * height, "iscrowd": 0, "score": float(score)}
                _add_object(content, ids[int(label)].id, [left, top, width, height], about)
    return content, folder


def _detections(
    predictor: Predictor, split: DetectionSplit, threshold: float, on_progress: OnProgress
) -> Iterator[tuple[ImageRecord, Detections]]:
    for first in range(0, len(split.records), BATCH):
        records = split.records[first : first + BATCH]
        found = predictor.predict([split.path(r) for r in records], threshold, BATCH)
        yield from zip(records, found, strict=True)
        on_progress(f"detecting on {split.name} images", first + len(records), len(split.records))


def _add_image(content: Content, split: DetectionSplit, record: ImageRecord, folder: Path) -> None:
    name = Path(os.path.relpath(split.path(record), folder)).as_posix()
    size = {"width": record.width, "height": record.height}
    content["images"].append({"id": len(content["images"]) + 1, "file_name": name, **size})


def _add_object(
    content: Content, category: int, box_xywh: list[float], about: dict[str, float]
) -> None:
    """An object of the newest image."""
    identity = {"id": len(content["annotations"]) + 1, "image_id": len(content["images"])}
    entry = {**identity, "category_id": category, "bbox": box_xywh, **about}
    content["annotations"].append(entry)


def _common_folder(splits: Sequence[DetectionSplit]) -> Path:
    """The folder that holds all of the images."""
    places = [split.images.location for split in splits]
    local = [place.absolute() for place in places if isinstance(place, Path)]
    if len(local) < len(places):
        raise UserError(
            "pseudo-labels are written for images on this machine: copy the folder here first"
        )
    return Path(os.path.commonpath(local))


def _categories(predictor: Predictor) -> tuple[Category, ...]:
    return tuple(Category(number, name) for number, name in predictor.info.categories)


def _require_same_names(predictor: Predictor, split: DetectionSplit) -> None:
    theirs = [category.name for category in _categories(predictor)]
    ours = [category.name for category in split.categories]
    if theirs != ours:
        raise UserError(
            f"the weights detect {', '.join(theirs)}; {split.annotations} annotates "
            f"{', '.join(ours)}. Expected the same categories in the same order"
        )
