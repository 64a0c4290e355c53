"""Hard pseudo-labels: a detector's confident detections, written as a COCO file to train on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from d3etr.config.data import DataConfig, UnlabelledConfig
from d3etr.data.annotations import Category
from d3etr.data.record_images import record_image
from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit, open_split
from d3etr.errors import UserError
from d3etr.evaluation.coco_metrics import GroundTruth, SplitDetections
from d3etr.inference import Detections, Predictor
from d3etr.progress import OnProgress, no_progress

BATCH = 32
"""Images that go through the detector together."""
_MAXIMUM = 100
"""Detections of an image that count where a threshold is chosen."""

Content = dict[str, Any]


class NoThresholdError(UserError):
    """No detection on the images that choose a threshold is right."""


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
        NoThresholdError: no detection is right.
        UserError: the classes differ, or an image cannot be read.
    """
    require_same_names(predictor, split)
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
        raise NoThresholdError(
            f"{split.annotations}: no detection is right, so no threshold is best: expected images "
            "with objects that the detector finds, or give --threshold a number"
        )
    return best


def pseudo_labels(
    predictor: Predictor,
    images: DetectionSplit,
    threshold: float,
    on_progress: OnProgress = no_progress,
) -> Content:
    """A COCO file's content: detections of at least ``threshold``, each with its ``score``.

    Args:
        predictor: the detector.
        images: what it looks at; annotations are not used.
        threshold: lowest score.
        on_progress: called with how many images are done.

    Raises:
        UserError: an image cannot be read.
    """
    content: Content = {
        "info": {"description": "pseudo-labels", "threshold": threshold},
        "images": [],
        "annotations": [],
        "categories": [{"id": c.id, "name": c.name} for c in _categories(predictor)],
    }
    for record, found in _detections(predictor, images, threshold, on_progress):
        size = {"width": record.width, "height": record.height}
        number = len(content["images"]) + 1
        content["images"].append({"id": number, "file_name": record.file_name, **size})
        content["annotations"] += _objects(found, number, len(content["annotations"]) + 1)
    return content


def with_unlabelled_images(
    data: DataConfig, on_progress: OnProgress = no_progress
) -> tuple[DetectionSplit, UnlabelledConfig]:
    """A training split that has images without labels, and what a recipe may call these.

    Args:
        data: with ``unlabelled``, whose ``labels`` are left out of account, or ``labelled_share``.
        on_progress: called while files are written or fetched.

    Raises:
        UserError: there are no such images, or the split cannot be used.
    """
    images = UnlabelledConfig(rest_of_train=True) if data.unlabelled is None else data.unlabelled
    images = images.model_copy(update={"labels": None})
    if data.unlabelled is None and data.labelled_share == 1:
        raise UserError(
            "the recipe has no images without labels: expected data.unlabelled, or "
            "data.labelled_share below 1"
        )
    train = open_split(data.model_copy(update={"unlabelled": images}), "train", on_progress)
    return train, images


def override_with(labels: Path, images: UnlabelledConfig) -> str:
    """The ``--set`` that makes a file the labels of images, whatever the recipe says of them.

    Args:
        labels: the file.
        images: that it was made of.
    """
    tree = images.model_dump(mode="json", exclude_defaults=True, exclude={"share"})
    # YAML takes JSON as it is, but for escapes of characters beyond 16 bits.
    text = json.dumps(tree | {"labels": str(labels)}, ensure_ascii=False)
    return f"data.unlabelled={text}"


def _detections(
    predictor: Predictor, split: DetectionSplit, threshold: float, on_progress: OnProgress
) -> Iterator[tuple[ImageRecord, Detections]]:
    for first in range(0, len(split.records), BATCH):
        records = split.records[first : first + BATCH]
        # As arrays: a PIL image still has the EXIF rotation that its annotations may rule out.
        images = (np.asarray(record_image(split, record)) for record in records)
        found = predictor.predict(images, threshold, BATCH)
        yield from zip(records, found, strict=True)
        on_progress(f"detecting on {split.name} images", first + len(records), len(split.records))


def _objects(found: Detections, image: int, first: int) -> list[dict[str, Any]]:
    """Entries of what was found on an image, numbered from ``first``; empty boxes are none."""
    entries = list[dict[str, Any]]()
    columns = found.labels.tolist(), found.scores.tolist(), found.boxes_xyxy.tolist()
    for label, score, (left, top, right, bottom) in zip(*columns, strict=True):
        box = [left, top, right - left, bottom - top]
        if min(box[2:]) > 0:
            about = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0, "score": score}
            identity = {"id": first + len(entries), "image_id": image, "category_id": label}
            entries.append(identity | about)
    return entries


def _categories(predictor: Predictor) -> tuple[Category, ...]:
    return tuple(Category(number, name) for number, name in predictor.info.categories)


def require_same_names(predictor: Predictor, split: DetectionSplit) -> None:
    """Make sure that a detector's classes are those of annotations, in the same order.

    Raises:
        UserError: they are not.
    """
    theirs = [category.name for category in _categories(predictor)]
    ours = [category.name for category in split.categories]
    if theirs != ours:
        raise UserError(
            f"the weights detect {', '.join(theirs)}; {split.annotations} annotates "
            f"{', '.join(ours)}. Expected the same categories in the same order"
        )
