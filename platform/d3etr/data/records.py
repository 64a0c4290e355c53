"""Images with their cleaned annotations: what training and evaluation work on in any format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d3etr.data.annotations import Annotations, ImageEntry, ObjectEntry

SHOWN = 5
"""Ids and names that a text lists."""


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


@dataclass(frozen=True)
class Cleaning:
    """What reading did to boxes; every entry is an annotation id.

    Attributes:
        zero_size: dropped, because width or height is not above 0.
        outside: dropped, because no part lies within the image.
        clipped: kept; their training target is the part within the image.
        crowd: kept for evaluation only.
        implausible_area: kept; evaluation sorts them small, medium and large by width x height.
        foreign_flag: kept as objects, though marked to be ignored in a way that is not COCO's.
    """

    zero_size: tuple[int, ...] = ()
    outside: tuple[int, ...] = ()
    clipped: tuple[int, ...] = ()
    crowd: tuple[int, ...] = ()
    implausible_area: tuple[int, ...] = ()
    foreign_flag: tuple[int, ...] = ()

    def texts(self, places: Mapping[int, str], *names: str) -> list[str]:
        """What was done, a sentence for each of the fields that is not empty.

        Args:
            places: where annotations are; empty where ids are the files' own.
            names: fields; all of them where none is named.
        """
        found = {name: getattr(self, name) for name in names or _DONE}
        return [
            f"{len(ids)} boxes {_DONE[name]} ({_shown_annotations(ids, places)})"
            for name, ids in found.items()
            if ids
        ]


def _shown_annotations(ids: Sequence[int], places: Mapping[int, str]) -> str:
    if not places:
        return f"annotation ids {shown_ids(ids)}"
    texts = [places[number] for number in ids[:SHOWN]]
    return ", ".join(texts) + (", ..." if len(ids) > SHOWN else "")


_DONE = {
    "zero_size": "dropped: width or height is not above 0",
    "outside": "dropped: outside of the image",
    "clipped": "clipped to the image for training",
    "implausible_area": "with an 'area' that is not above 0 or is larger than the box: width x "
    "height is taken instead",
    "foreign_flag": "marked 'ignore', 'difficult' or the like, which has no effect in COCO files: "
    "they count as objects; 'iscrowd': 1 would set them aside",
}


def to_xyxy(boxes_xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, 4] corners of boxes given by corner, width and height."""
    low = boxes_xywh[:, :2]
    return np.concatenate([low, low + boxes_xywh[:, 2:]], axis=1)


def clean(raw: Annotations) -> tuple[tuple[ImageRecord, ...], Cleaning, dict[int, str]]:
    """Drop what is no box and sort the rest by image.

    Returns:
        A record per image; what was done; and where the annotations are that it was done to,
        by id, unless ids are the files' own.
    """
    table = _Table.of(raw.objects)
    boxes = to_xyxy(table.boxes_xywh)
    sizes = np.array([(image.width, image.height) for image in raw.images], dtype=np.float64)
    limits = np.tile(sizes[table.images], 2)
    inside = np.clip(boxes, 0.0, limits)
    zero = (table.boxes_xywh[:, 2:] <= 0).any(1)
    outside = ~zero & (inside[:, 2:] <= inside[:, :2]).any(1)
    kept = ~(zero | outside)
    masks = {
        "zero_size": zero,
        "outside": outside,
        "clipped": kept & (inside != boxes).any(1) & ~table.crowd,
        "crowd": kept & table.crowd,
        "implausible_area": kept & table.implausible_area,
        "foreign_flag": kept & table.foreign_flag,
    }
    cleaning = Cleaning(**{name: tuple(table.ids[mask].tolist()) for name, mask in masks.items()})
    touched = [] if raw.own_ids else np.flatnonzero(np.any([*masks.values()], axis=0)).tolist()
    places = {raw.objects[index].id: raw.objects[index].place for index in touched}
    order = np.flatnonzero(kept)[np.argsort(table.images[kept], kind="stable")]
    ends = np.cumsum(np.bincount(table.images[order], minlength=len(raw.images)))
    parts = np.split(order, ends[:-1])
    records = tuple(
        _record(table, image, part) for image, part in zip(raw.images, parts, strict=True)
    )
    return records, cleaning, places


@dataclass(frozen=True, eq=False)
class _Table:
    """Objects by column, [A] or [A, 4] each; see ``ObjectEntry``."""

    ids: NDArray[np.int64]
    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]
    areas: NDArray[np.float64]
    implausible_area: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    foreign_flag: NDArray[np.bool_]

    @classmethod
    def of(cls, objects: Sequence[ObjectEntry]) -> _Table:
        # Ids may be above 2**53, where float64 has gaps.
        integers = np.array([entry[:3] for entry in objects], dtype=np.int64).reshape(-1, 3)
        boxes = np.array([entry.box_xywh for entry in objects], dtype=np.float64).reshape(-1, 4)
        areas, implausible = _plausible_areas(boxes, [entry.area for entry in objects])
        return cls(
            ids=integers[:, 0],
            images=integers[:, 1],
            labels=integers[:, 2],
            boxes_xywh=boxes,
            areas=areas,
            implausible_area=implausible,
            crowd=np.array([entry.crowd for entry in objects], dtype=np.bool_),
            foreign_flag=np.array([entry.foreign_flag for entry in objects], dtype=np.bool_),
        )


def _plausible_areas(
    boxes_xywh: NDArray[np.float64], given: list[float | None]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Areas [A] to evaluate by, and [A] whether the file's own cannot be its box's.

    An outline is smaller than its box, often by far. It seems larger where sides are rounded,
    or where width is counted from pixel to pixel: by a pixel each at most.
    """
    own = np.array([math.nan if area is None else area for area in given], dtype=np.float64)
    sides = np.maximum(boxes_xywh[:, 2:], 0)
    plausible = (own > 0) & (own <= 1.01 * np.prod(sides + 1, axis=1))
    lacks = np.array([area is None for area in given], dtype=np.bool_)
    return np.where(plausible, own, np.prod(sides, axis=1)), ~(plausible | lacks)


def _record(raw: _Table, image: ImageEntry, part: NDArray[np.intp]) -> ImageRecord:
    return ImageRecord(
        id=image.id,
        file_name=image.file_name,
        width=image.width,
        height=image.height,
        labels=raw.labels[part],
        boxes_xywh=raw.boxes_xywh[part],
        areas=raw.areas[part],
        crowd=raw.crowd[part],
    )


def shown_ids(ids: Iterable[int]) -> str:
    """The first few of ``ids``."""
    texts = [str(number) for number in ids]
    return ", ".join(texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "")
