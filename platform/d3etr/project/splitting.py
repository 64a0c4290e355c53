"""Dividing the images of one folder into train, validation and test, by lists alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit
from d3etr.errors import UserError

SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}
FEWEST_IMAGES = 10
_LEAD = 0.05
"""Of all images: by so much the first split may be ahead for the sake of classes that it lacks."""


def divide(
    records: Sequence[ImageRecord], shares: Mapping[str, float] = SHARES
) -> dict[str, list[ImageRecord]]:
    """Divide images at random into their shares, so that each class is divided by them too.

    An image's place in the order depends on its name alone, so a repeated call divides alike.
    Images are given away class by class, the rarest first, to the split that lacks most of their
    classes and of images (after Sechidis et al. 2011). Images without objects are divided apart.

    Args:
        records: of all images.
        shares: of each split, in any unit, the one to learn from first.

    Returns:
        Split -> its images, in the order of ``records``.

    Raises:
        UserError: there are hardly any images.
    """
    if len(records) < FEWEST_IMAGES:
        raise UserError(
            f"found {len(records)} images; expected at least {FEWEST_IMAGES} to divide into "
            f"{', '.join(shares)}: add some, or divide them yourself"
        )
    parts = np.array([*shares.values()]) / sum(shares.values())
    order = sorted(range(len(records)), key=lambda index: _place(records[index].file_name))
    shows = _shown_classes(records)
    chosen = np.zeros(len(records), dtype=np.int64)
    for wanted in (True, False):
        group = [index for index in order if shows[index].any() == wanted]
        chosen[group] = _assigned(shows[group], parts, _sizes(len(group), parts))
    return {
        name: [record for record, split in zip(records, chosen, strict=True) if split == number]
        for number, name in enumerate(shares)
    }


def _shown_classes(records: Sequence[ImageRecord]) -> NDArray[np.bool_]:
    """[images, classes]: whether an image has an object of a class."""
    found = [record.labels[~record.crowd] for record in records]
    classes = max((int(labels.max()) + 1 for labels in found if len(labels)), default=0)
    shows = np.zeros((len(records), classes), dtype=np.bool_)
    for row, labels in zip(shows, found, strict=True):
        row[labels] = True
    return shows


def _sizes(images: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many of so many images each split gets: one at least where there are enough."""
    sizes = np.zeros(len(shares), dtype=np.int64)
    for _ in range(images):
        sizes[np.argmax(np.where(sizes == 0, images, 0) + shares * images - sizes)] += 1
    return sizes


def _assigned(
    shows: NDArray[np.bool_], shares: NDArray[np.float64], room: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The split of each image.

    Args:
        shows: [images, classes], in the order in which images of a class are given away.
        shares: of the splits.
        room: images of each split.
    """
    given = np.zeros(len(shows), dtype=np.int64)
    have, images = np.zeros((shows.shape[1], len(shares))), np.zeros(len(shares), dtype=np.int64)
    for index in _rarest_first(shows):
        classes = np.flatnonzero(shows[index])
        lacks = shares * (images.sum() + 1) - images
        lacks += (shares * (have[classes].sum(1, keepdims=True) + 1) - have[classes]).sum(0)
        lacks[0] += _LEAD * len(shows) * (have[classes, 0] == 0).any()
        split = np.argmax(np.where(images < room, lacks, -np.inf))
        have[classes, split] += 1
        images[split] += 1
        given[index] = split
    return given


def _rarest_first(shows: NDArray[np.bool_]) -> Iterator[int]:
    """Images by the rarest class among those that are left, in their order within a class."""
    left, counts = np.arange(len(shows)), shows.sum(0)
    while counts.any():
        rarest = np.argmin(np.where(counts, counts, len(shows) + 1))
        has = shows[left, rarest]
        yield from left[has].tolist()
        counts = counts - shows[left[has]].sum(0)
        left = left[~has]
    yield from left.tolist()


def _place(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def coco_tree(split: DetectionSplit, records: Sequence[ImageRecord]) -> dict[str, Any]:
    """A COCO file of some images of a split, whatever format the split has.

    Args:
        split: its classes.
        records: the images, with their boxes as annotated.
    """
    ids = [category.id for category in split.categories]
    annotations = [
        {
            "image_id": record.id,
            "category_id": ids[label],
            "bbox": [round(float(side), 3) for side in box],
            "area": round(float(area), 3),
            "iscrowd": int(crowd),
        }
        for record in records
        for label, box, area, crowd in zip(
            record.labels, record.boxes_xywh, record.areas, record.crowd, strict=True
        )
    ]
    return {
        "categories": [{"id": c.id, "name": c.name} for c in split.categories],
        "images": [
            {"id": r.id, "file_name": r.file_name, "width": r.width, "height": r.height}
            for r in records
        ],
        "annotations": [{"id": k, **entry} for k, entry in enumerate(annotations, start=1)],
    }
