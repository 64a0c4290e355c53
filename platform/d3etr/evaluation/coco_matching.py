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
from typing import Any

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
        overlaps = _overlaps(detections, objects, rows, columns)
        rows, columns, overlaps = _within_reach(rows, columns, overlaps, thresholds.min())
        hit, skip = _match_bucket(overlaps, objects, skipped, rows, columns, thresholds)
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


def _within_reach(
    rows: Indices, columns: Indices, overlaps: Array, least: float
) -> tuple[Indices, Indices, Array]:
    """The same tables with those detections alone that overlap an object enough.

    The others match nothing at any threshold, and most are others.
    """
    reaches = overlaps.max(-1) >= least
    counts = reaches.sum(1)
    pairs = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    order = np.argsort(~reaches[pairs], axis=1, kind="stable")[:, : counts.max()]
    chosen = pairs[:, None], order
    return np.where(reaches[chosen], rows[chosen], -1), columns[pairs], overlaps[chosen]


def _match_bucket(
    overlaps: Array,
    objects: Boxes,
    skipped: Flags,
    rows: Indices,
    columns: Indices,
    thresholds: Array,
) -> tuple[Flags, Flags]:
    """[A, T, P, ranks] each: matched, and matched with an ignored object."""
    keys = _preferences(overlaps, skipped[:, columns])
    overlaps = np.ascontiguousarray(np.moveaxis(overlaps, 0, -1))
    usual = ~objects.crowd[columns].T[:, None, None]  # [G, 1, 1, P]
    least = np.minimum(thresholds, 1 - 1e-10)[:, None]
    free = np.ones((columns.shape[1], len(skipped), len(thresholds), len(rows)), dtype=bool)
    hit = np.zeros((len(skipped), len(thresholds), *rows.shape), dtype=bool)
    skip = np.zeros_like(hit)
    for rank in range(rows.shape[1]):
        active = int((rows[:, rank] >= 0).sum())  # pairs are sorted by their detections
        enough = overlaps[rank, :, None, :active] >= least  # [G, T, active]
        fits = free[..., :active] & enough[:, None]
        wish = fits * keys[rank, :, :, None, :active]
        best = wish.max(0)
        hit[:, :, :active, rank] = best > 0
        skip[:, :, :active, rank] = (best > 0) & (best <= columns.shape[1])
        free[..., :active] &= ~(fits & (wish == best) & usual[..., :active])
    return hit, skip


def _preferences(overlaps: Array, ignore: Flags) -> NDArray[np.integer[Any]]:
    """[ranks, G, A, P]: the place, from 1, of each object among those that a detection would take.

    The best comes last: regular objects after ignored ones [A, P, G], then by overlap
    [P, ranks, G], and of equal ones the last, as in COCO.
    """
    number = overlaps.shape[-1]
    places = overlaps.argsort(-1, kind="stable").argsort(-1).transpose(1, 2, 0)[:, :, None] + 1
    later = number * ~ignore.transpose(2, 0, 1)
    preferences: NDArray[np.integer[Any]] = (places + later).astype(np.min_scalar_type(2 * number))
    return preferences


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
