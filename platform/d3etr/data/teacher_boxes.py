"""Boxes that a detector of any kind has found: COCO results files (``teacher.detections``).

A file is a JSON list with an object a box: ``image_id`` of the training annotations, ``bbox`` as
[x, y, width, height] in pixels of the original image, ``score`` in [0, 1], and the class, by
``category_id`` or, where it is there, by ``category_name``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3etr.config.location import Location
from d3etr.data.annotations import Problems, box_problem
from d3etr.data.records import to_xyxy
from d3etr.data.splits import DetectionSplit
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.storage.fetch import local_file

logger = get_logger(__name__)
_SHOWN, _TITLE = 8, "COCO results file"


@dataclass(frozen=True, eq=False)
class FoundBoxes:
    """What was found in one image, k boxes.

    Attributes:
        labels: [k] in [0, C).
        boxes_xyxy: [k, 4] pixels, within the image.
        scores: [k] in [0, 1].
    """

    labels: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float64]
    scores: NDArray[np.float32]


def read_teacher_boxes(
    files: Sequence[Location], split: DetectionSplit, minimum_score: float
) -> tuple[FoundBoxes, ...]:
    """Boxes of each image of a split, from all files together.

    Args:
        files: COCO results.
        split: whose images and categories are meant.
        minimum_score: boxes below it are left out.

    Returns:
        One for each record.

    Raises:
        UserError: a file cannot be read, has an entry that cannot be used, or names nothing of
            this split.
    """
    rows: dict[int, list[tuple[int, list[float], float]]] = defaultdict(list)
    known = {record.id for record in split.records}
    for place in files:
        entries = _entries(place)
        _read(entries, place, split, minimum_score, rows)
        if entries and not any(_image(entry) in known for entry in entries):
            raise UserError(
                f"teacher.detections {place}: none of its {len(entries)} boxes is in an image of "
                f"{split.annotations} (an image id there: {split.records[0].id}): expected results "
                "on the training images, with the annotations' image ids"
            )
    without = sum(record.id not in rows for record in split.records)
    if without:
        logger.warning(
            "teacher.detections: %d of %d training images have no box of at least %g; there the "
            "teacher says that nothing is",
            *(without, len(split.records), minimum_score),
        )
    return tuple(_of_image(rows[r.id], r.width, r.height) for r in split.records)


def _entries(place: Location) -> list[Any]:
    try:
        with local_file(place) as file:
            content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"teacher.detections {place}: cannot be read ({error}): expected a COCO results file"
        ) from error
    if not isinstance(content, list):
        raise UserError(
            f"teacher.detections {place}: found a {type(content).__name__} at the top; expected a "
            "COCO results file, a list of boxes with image_id, category_id, bbox and score"
        )
    return content


def _read(
    entries: Sequence[Any],
    place: Location,
    split: DetectionSplit,
    minimum_score: float,
    rows: Mapping[int, list[tuple[int, list[float], float]]],
) -> None:
    """Check every box of a file and add those that count to the rows of their images."""
    by_id = {category.id: label for label, category in enumerate(split.categories)}
    by_name = {category.name: label for label, category in enumerate(split.categories)}
    problems, unknown = Problems(f"teacher.detections {place}", _TITLE), set[str]()
    for position, entry in enumerate(entries):
        problem = _problem(entry)
        if problem is not None:
            problems.add(f"[{position}]: {problem}")
            continue
        name, number = entry.get("category_name"), entry.get("category_id")
        label = by_id.get(number) if name is None else by_name.get(name)
        if label is None:
            unknown.add(f"id {number!r:.40}" if name is None else f"{name!r:.40}")
        elif entry["score"] >= minimum_score:
            rows[entry["image_id"]].append((label, entry["bbox"], entry["score"]))
    problems.raise_if_any()
    if unknown:
        shown = ", ".join(sorted(unknown)[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
        ours = ", ".join(f"{c.id}: {c.name}" for c in split.categories[:_SHOWN])
        raise UserError(
            f"teacher.detections {place}: classes that {split.annotations} does not have: {shown} "
            f"(it has {ours}{', ...' if len(split.categories) > _SHOWN else ''}). Write the "
            "annotations' category_id, or a category_name into each entry, or leave those boxes out"
        )


def _image(entry: Any) -> object:
    return entry.get("image_id") if isinstance(entry, dict) else None


def _problem(entry: Any) -> str | None:
    """Why an entry cannot be used, or None."""
    if not isinstance(entry, dict):
        return f"expected an object, found {entry!r:.60}"
    missing = [key for key in ("image_id", "bbox", "score") if key not in entry]
    if "category_id" not in entry and "category_name" not in entry:
        missing.append("category_id")
    if missing:
        return f"missing key {', '.join(missing)}"
    if not isinstance(entry["image_id"], int):
        return f"image_id is {entry['image_id']!r:.40}; expected the annotations' number"
    if not all(isinstance(entry.get(key), int | str | None) for key in _CLASS_KEYS):
        return "category_id or category_name is neither a number nor a text"
    score = entry["score"]
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        return f"score is {score!r:.40}; expected a probability, 0 to 1"
    return box_problem(entry["bbox"], None)


_CLASS_KEYS = ("category_id", "category_name")


def _of_image(rows: list[tuple[int, list[float], float]], width: int, height: int) -> FoundBoxes:
    """What is inside of an image; boxes that nothing is left of are dropped."""
    boxes = to_xyxy(np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4))
    boxes = np.clip(boxes, 0.0, np.array([width, height] * 2, dtype=np.float64))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return FoundBoxes(
        np.array([row[0] for row in rows], dtype=np.int64)[kept],
        boxes[kept],
        np.array([row[2] for row in rows], dtype=np.float32)[kept],
    )
