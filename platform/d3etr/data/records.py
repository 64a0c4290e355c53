"""Images with their cleaned annotations: what training and evaluation work on in any format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from d3etr.data.annotations import Annotations

SHOWN = 5
"""Ids and names that a text lists."""

_FAR = 1e300

CLEANED = {
    "zero_size": "dropped: width or height is not above 0",
    "outside": "dropped: outside of the image",
    "clipped": "clipped to the image for training",
    "crowd": "set aside as crowds: no training targets, and ignored in evaluation",
    "implausible_area": "with an 'area' that is not above 0 or is larger than the box: width x "
    "height is taken instead",
    "foreign_flag": "marked 'ignore', 'difficult' or the like, which has no effect in COCO files: "
    "they count as objects; 'iscrowd': 1 would set them aside",
}
"""What reading does to boxes."""

Cleaning = Mapping[str, tuple[int | str, ...]]
"""Key of ``CLEANED`` -> annotations: their ids, or file and line where ids are not the files'."""


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image and everything annotated in it; n annotations, crowds included.

    Attributes:
        id: the annotation file's image id, or a number from 1 where images have none.
        file_name: relative to the split's image folder.
        width: pixels, as annotated.
        height: pixels, as annotated.
        labels: [n] contiguous labels, indices into the split's categories.
        boxes_xywh: [n, 4] pixels, as annotated: what evaluation compares with. May reach over
            the image's edge, as COCO's own tools leave it.
        areas: [n] square pixels, what evaluation sorts small, medium and large by.
        crowd: [n] bool; crowds are no training targets and are ignored in evaluation.
    """

    id: int
    file_name: str
    width: int
    height: int
    labels: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]

    @property
    def boxes_xyxy(self) -> NDArray[np.float64]:
        """[n, 4] corners of ``boxes_xywh``."""
        return to_xyxy(self.boxes_xywh)

    def objects(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Training targets: labels [m] and boxes_xyxy [m, 4], clipped to the image, no crowds."""
        single = ~self.crowd
        limits = np.array([self.width, self.height] * 2, dtype=np.float64)
        return self.labels[single], np.clip(self.boxes_xyxy[single], 0.0, limits)


def without_objects(record: ImageRecord) -> ImageRecord:
    """The same image; nothing is known of what is on it."""
    none = slice(0, 0)
    return replace(
        record,
        labels=record.labels[none],
        boxes_xywh=record.boxes_xywh[none],
        areas=record.areas[none],
        crowd=record.crowd[none],
    )


@dataclass(frozen=True, eq=False)
class Objects:
    """The n objects of several images, crowds left out.

    Attributes:
        images: [n] index of each one's record.
        sizes: [n, 2] width and height of its image, pixels.
        labels: [n] contiguous labels.
        boxes_xywh: [n, 4] pixels, as annotated.
        areas: [n] square pixels, as evaluation takes them.
    """

    images: NDArray[np.int64]
    sizes: NDArray[np.float64]
    labels: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]
    areas: NDArray[np.float64]

    @classmethod
    def of(cls, records: Sequence[ImageRecord]) -> Objects:
        """Those of one record or more."""
        single = ~np.concatenate([record.crowd for record in records])
        counts = [len(record.labels) for record in records]
        images = np.repeat(np.arange(len(records)), counts)[single]
        sizes = np.array([(record.width, record.height) for record in records], dtype=np.float64)
        return cls(
            images,
            sizes[images],
            np.concatenate([record.labels for record in records])[single],
            np.concatenate([record.boxes_xywh for record in records])[single],
            np.concatenate([record.areas for record in records])[single],
        )


def to_xyxy(boxes_xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, 4] corners of boxes given by corner, width and height."""
    low = boxes_xywh[:, :2]
    return np.concatenate([low, low + boxes_xywh[:, 2:]], axis=1)


def clean(raw: Annotations) -> tuple[tuple[ImageRecord, ...], Cleaning]:
    """Drop what is no box and sort the rest by image.

    Returns:
        A record per image, and what was done.
    """
    objects = raw.objects
    # Ids may be above 2**53, where float64 has gaps.
    images, labels = np.array([o[1:3] for o in objects], dtype=np.int64).reshape(-1, 2).T
    boxes_xywh = np.array([o.box_xywh for o in objects], dtype=np.float64).reshape(-1, 4)
    crowd = np.array([o.crowd for o in objects], dtype=np.bool_)
    areas, implausible = _plausible_areas(boxes_xywh, [o.area for o in objects])
    boxes = to_xyxy(boxes_xywh)
    sizes = np.array([(image.width, image.height) for image in raw.images], dtype=np.float64)
    inside = np.clip(boxes, 0.0, np.tile(sizes[images], 2))
    zero = (boxes_xywh[:, 2:] <= 0).any(1)
    outside = ~zero & (inside[:, 2:] <= inside[:, :2]).any(1)
    kept = ~(zero | outside)
    masks = {
        "zero_size": zero,
        "outside": outside,
        "clipped": kept & (inside != boxes).any(1) & ~crowd,
        "crowd": kept & crowd,
        "implausible_area": kept & implausible,
        "foreign_flag": kept & np.array([o.foreign_flag for o in objects], dtype=np.bool_),
    }
    cleaning: Cleaning = {
        name: tuple(
            objects[i].id if raw.own_ids else objects[i].place
            for i in np.flatnonzero(mask).tolist()
        )
        for name, mask in masks.items()
    }
    order = np.flatnonzero(kept)[np.argsort(images[kept], kind="stable")]
    ends = np.cumsum(np.bincount(images[order], minlength=len(raw.images)))
    records = tuple(
        ImageRecord(
            **vars(image),
            labels=labels[part],
            boxes_xywh=boxes_xywh[part],
            areas=areas[part],
            crowd=crowd[part],
        )
        for image, part in zip(raw.images, np.split(order, ends[:-1]), strict=True)
    )
    return records, cleaning


def _plausible_areas(
    boxes_xywh: NDArray[np.float64], given: list[float | None]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Areas [A] to evaluate by, and [A] whether the file's own cannot be its box's.

    An outline is smaller than its box, often by far. It seems larger where sides are rounded,
    or where width is counted from pixel to pixel: by a pixel each at most.
    """
    # Integers may be larger than any float.
    own = np.array(
        [math.nan if area is None else max(-_FAR, min(area, _FAR)) for area in given],
        dtype=np.float64,
    )
    sides = np.maximum(boxes_xywh[:, 2:], 0)
    plausible = (own > 0) & (own <= 1.01 * np.prod(sides + 1, axis=1))
    lacks = np.array([area is None for area in given], dtype=np.bool_)
    return np.where(plausible, own, np.prod(sides, axis=1)), ~(plausible | lacks)


def cleaning_texts(cleaning: Cleaning, *left_out: str) -> list[str]:
    """What was done to boxes, a sentence for each key of ``CLEANED`` that has any."""
    return [
        f"{len(found)} boxes {CLEANED[name]} "
        f"({'annotation ids ' if isinstance(found[0], int) else ''}{shown_ids(found)})"
        for name, found in cleaning.items()
        if found and name not in left_out
    ]


def shown_ids(ids: Iterable[object]) -> str:
    """The first few of ``ids``."""
    texts = [str(number) for number in ids]
    return ", ".join(texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "")
