"""COCO's greedy matching of detections with objects, all images and classes at once.

pycocotools does this in Python loops over images, classes, area ranges, thresholds, detections
and objects. Here a loop is left over the rank of a detection among those of its image and
class; overlaps come from pycocotools' compiled code, so results are its own to the last bit.

Letters: P pairs of (image, class) that have both detections and objects · A area ranges ·
T IoU thresholds · G objects of a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Boxes:
    """Boxes of many images and classes, those of an (image, class) pair side by side.

    Attributes:
        pair: [n] image index * classes + class index, ascending.
        xywh: [n, 4] in pixels.
        area: [n] in square pixels.
        score: [n]; within a pair descending. Zero for objects.
        crowd: [n]; False for detections.
    """

    pair: Indices
    xywh: Array
    area: Array
    score: Array
    crowd: Flags

    def __len__(self) -> int:
        return len(self.pair)

    def outside(self, ranges: Array) -> Flags:
        """[A, n]: the area is not in the range; ranges [A, 2] include both ends."""
        low, high = ranges[:, :1], ranges[:, 1:]
        return (self.area < low) | (self.area > high)


@dataclass(frozen=True)
class Matches:
    """What became of every detection.

    Attributes:
        matched: [A, T, n] bool.
        ignored: [A, T, n] bool: neither right nor wrong.
    """

    matched: Flags
    ignored: Flags


def ranks(pair: Indices) -> Indices:
    """[n] position of each entry within its pair; equal pairs are side by side."""
    starts = np.flatnonzero(np.r_[True, pair[1:] != pair[:-1]]) if len(pair) else np.arange(0)
    lengths = np.diff(np.r_[starts, len(pair)])
    return np.arange(len(pair)) - np.repeat(starts, lengths)


def match(detections: Boxes, objects: Boxes, ranges: Array, thresholds: Array) -> Matches:
    """Match every detection, best first, with the object that it overlaps most.

    Objects that are crowds or outside of the area range are ignored: a detection takes one
    only if there is no other, and then is ignored itself. Crowds may be taken repeatedly.

    Args:
        detections: at most as many per pair as count.
        objects: of all images.
        ranges: [A, 2] smallest and largest area.
        thresholds: [T] smallest overlap, IoU.
    """
    shape = (len(ranges), len(thresholds), len(detections))
    matched, ignored = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    skipped = objects.crowd | objects.outside(ranges)
    for rows, columns in _buckets(detections, objects):
        hit, skip = _match_bucket(detections, objects, skipped, rows, columns, thresholds)
        valid = rows >= 0
        matched[:, :, rows[valid]] = hit[:, :, valid]
        ignored[:, :, rows[valid]] = skip[:, :, valid]
    ignored |= ~matched & detections.outside(ranges)[:, None]
    return Matches(matched, ignored)


def _buckets(detections: Boxes, objects: Boxes) -> Iterator[tuple[Indices, Indices]]:
    """Pairs with like numbers of objects, as padded tables of indices.

    Yields:
        Detections [P, ranks] and objects [P, G] of each pair, -1 in unused places; pairs with
        the most detections first.
    """
    pairs = np.intersect1d(detections.pair, objects.pair)
    first, last = (np.searchsorted(detections.pair, pairs, side) for side in ("left", "right"))
    begin, end = (np.searchsorted(objects.pair, pairs, side) for side in ("left", "right"))
    size = np.ceil(np.log2(np.maximum(end - begin, 1))).astype(np.int64)  # 1, 2, 4, 8, ...
    for bucket in np.unique(size):
        chosen = np.flatnonzero(size == bucket)
        chosen = chosen[np.argsort(first[chosen] - last[chosen], kind="stable")]
        yield _table(first[chosen], last[chosen]), _table(begin[chosen], end[chosen])


def _table(first: Indices, last: Indices) -> Indices:
    """[P, longest] the indices from ``first`` up to ``last``, -1 behind."""
    columns = first[:, None] + np.arange((last - first).max())
    return np.where(columns < last[:, None], columns, -1)


def _match_bucket(
    detections: Boxes,
    objects: Boxes,
    skipped: Flags,
    rows: Indices,
    columns: Indices,
    thresholds: Array,
) -> tuple[Flags, Flags]:
    """[A, T, P, ranks] each: matched, and matched with an ignored object."""
    overlaps = _overlaps(detections, objects, rows, columns)
    absent = columns < 0
    ignore = skipped[:, columns]  # [A, P, G]
    crowd = objects.crowd[columns]
    least = np.minimum(thresholds, 1 - 1e-10)[None, :, None, None]
    taken = np.broadcast_to(absent, (len(skipped), len(thresholds), *columns.shape)).copy()
    hit = np.zeros((len(skipped), len(thresholds), *rows.shape), dtype=bool)
    skip = np.zeros_like(hit)
    for rank in range(rows.shape[1]):
        active = int((rows[:, rank] >= 0).sum())  # pairs are sorted by their detections
        overlap = overlaps[:active, rank]
        fits = ~taken[:, :, :active] & (overlap >= least)
        regular = fits & ~ignore[:, None, :active]
        fits = np.where(regular.any(-1, keepdims=True), regular, fits)
        best = _last_argmax(np.where(fits, overlap, -1.0))[..., None]
        found = fits.any(-1)
        hit[:, :, :active, rank] = found
        of_best = np.broadcast_to(ignore[:, None, :active], fits.shape)
        skip[:, :, :active, rank] = found & np.take_along_axis(of_best, best, -1)[..., 0]
        now = np.take_along_axis(taken[:, :, :active], best, -1)[..., 0]
        free = np.take_along_axis(np.broadcast_to(crowd[:active], fits.shape), best, -1)[..., 0]
        np.put_along_axis(taken[:, :, :active], best, (now | (found & ~free))[..., None], -1)
    return hit, skip


def _last_argmax(values: Array) -> Indices:
    """Index of the largest value along the last axis; of equal ones the last, as in COCO."""
    last: Indices = values.shape[-1] - 1 - values[..., ::-1].argmax(-1)
    return last


def _overlaps(detections: Boxes, objects: Boxes, rows: Indices, columns: Indices) -> Array:
    """[P, ranks, G] IoU (for crowds: share of the detection), -1 in unused places."""
    overlaps = np.full((*rows.shape, columns.shape[1]), -1.0)
    numbers = zip((rows >= 0).sum(1).tolist(), (columns >= 0).sum(1).tolist(), strict=True)
    for index, (found, present) in enumerate(numbers):
        row, column = rows[index, :found], columns[index, :present]
        overlaps[index, :found, :present] = mask.iou(
            detections.xywh[row], objects.xywh[column], objects.crowd[column].astype(np.uint8)
        )
    return overlaps
