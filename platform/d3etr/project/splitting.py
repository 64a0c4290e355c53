"""Dividing the images of one folder into train, validation and test, by lists alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit
from d3etr.errors import UserError

SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}
FEWEST_IMAGES = 10


def divide(records: Sequence[ImageRecord]) -> dict[str, list[ImageRecord]]:
    """Divide images at random, so that each class is in each split by about the same share.

    An image's place in the order depends on its name alone, so a repeated call divides alike.
    Images are given away class by class, the rarest first, to the split that lacks most of it
    (Sechidis et al. 2011, without its ties).

    Args:
        records: of all images.

    Returns:
        Split -> its images, in the order of ``records``.

    Raises:
        UserError: there are hardly any images.
    """
    if len(records) < FEWEST_IMAGES:
        raise UserError(
            f"found {len(records)} images; expected at least {FEWEST_IMAGES} to divide into "
            f"{', '.join(SHARES)}"
        )
    order = sorted(range(len(records)), key=lambda index: _place(records[index].file_name))
    classes = [{*record.labels[~record.crowd].tolist()} for record in records]
    wanted = {name: share * len(records) for name, share in SHARES.items()}
    chosen: dict[str, list[int]] = {name: [] for name in SHARES}
    left = list(order)
    while left:
        counts = np.bincount([label for index in left for label in classes[index]] or [0])
        rarest = min((int(k) for k in counts.nonzero()[0]), key=lambda k: counts[k], default=None)
        part = [index for index in left if rarest in classes[index]] or list(left)
        have = {name: _having(chosen[name], classes, rarest) for name in SHARES}
        total = len(part) + sum(have.values())
        for index in part:
            name = max(
                SHARES,
                key=lambda name: (
                    SHARES[name] * total - have[name],
                    wanted[name] - len(chosen[name]),
                ),
            )
            chosen[name].append(index)
            have[name] += 1
        taken = {*part}
        left = [index for index in left if index not in taken]
    return {name: [records[index] for index in sorted(found)] for name, found in chosen.items()}


def _having(chosen: Sequence[int], classes: Sequence[set[int]], label: int | None) -> int:
    """How many images of a split have a class; all of them where there is no class."""
    return len(chosen) if label is None else sum(label in classes[index] for index in chosen)


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
