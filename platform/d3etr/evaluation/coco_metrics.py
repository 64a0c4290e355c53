"""COCO detection metrics, those of pycocotools to the last bit, from plain arrays.

pycocotools walks in Python over images, classes, area ranges, thresholds, detections and objects.
Here a loop is left over the rank of a detection in its image and class; overlaps come from
pycocotools' compiled code.

Letters: C classes; A area ranges; T IoU thresholds; n detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.cocoeval import Params

from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")

COCO_NAMES = (
    *("mAP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR", "AR_small", "AR_medium", "AR_large"),
)
"""The twelve numbers, in pycocotools' order."""


@dataclass(frozen=True)
class CocoMetrics:
    """COCO's metrics of a set of detections.

    Attributes:
        values: ``COCO_NAMES`` -> fraction in [0, 1]; None where there are no such objects. AP is
            the mean over IoU 0.5, 0.55, .. 0.95 and classes, AP50 and AP75 those at one IoU; small
            objects are under 32^2 pixels, large ones above 96^2. AR is the mean recall of all
            detections that count, AR1 and AR10 of the best (ten) of each image and class.
        per_class: class name -> average precision.
        precision: [10 IoU thresholds, 101 recalls, C], -1 for classes without objects.
        images: number of images.
        objects: number of objects that count (no crowds).
    """

    values: dict[str, float | None]
    per_class: dict[str, float | None]
    precision: Array
    images: int
    objects: int

    def as_dict(self) -> dict[str, float]:
        """Name -> value, without those that no object stands behind: never a NaN or a -1."""
        values = self.values | {f"AP/{name}": value for name, value in self.per_class.items()}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, eq=False)
class SplitDetections:
    """n detections in images of one split.

    Attributes:
        image_ids: [n] the annotation file's ids: integers all the way, as float64 has gaps
            above 2**53.
        labels: [n] class indices.
        scores: [n].
        boxes_xyxy: [n, 4] in pixels of the original image.
    """

    image_ids: Integers
    labels: Integers
    scores: Array
    boxes_xyxy: Array


class GroundTruth:
    """The cleaned annotations of a split, crowds included, ready to be measured against.

    Args:
        split: what training reads is what is measured against: a box that reading dropped
            does not count as missed.

    Attributes:
        names: of the C classes.
        images: how many there are.
        objects: of all images, in ascending order of the images' ids.
    """

    def __init__(self, split: DetectionSplit) -> None:
        self.names = [category.name for category in split.categories]
        records = sorted(split.records, key=lambda record: record.id)
        self._image_ids = np.array([record.id for record in records], dtype=np.int64)
        self.images = len(records)
        self.objects = _objects(records, len(self.names))

    def measure(self, detections: SplitDetections, maximum: int) -> CocoMetrics:
        """Measure detections.

        Args:
            detections: those of images outside of the split do not count.
            maximum: detections per image and class that count, best first.
        """
        return self.metrics(self.match(detections, maximum))

    def match(self, detections: SplitDetections, maximum: int) -> MatchedDetections:
        """Match detections with the objects of their images; see ``measure``."""
        params = Params("bbox")
        ranges = np.array(params.areaRng, dtype=np.float64)
        found = self.find(detections, maximum)
        matches = match(found, self.objects, ranges, params.iouThrs)
        return MatchedDetections(found, matches, maximum)

    def metrics(self, matched: MatchedDetections) -> CocoMetrics:
        """What matched detections are worth."""
        params = Params("bbox")
        counts = self._counts(np.array(params.areaRng, dtype=np.float64))
        limits = (1, 10, matched.maximum)
        return self._metrics(
            *_curves(matched.boxes, matched.matches, counts, params.recThrs, limits)
        )

    def best_threshold(
        self, detections: SplitDetections, maximum: int
    ) -> tuple[float, float] | None:
        """The score above which detections have the highest F1, and that F1.

        At IoU 0.5, images and classes together; None where no detection is right.

        Args:
            detections: those of images outside of the split do not count.
            maximum: detections per image and class that count, best first.
        """
        found = self.find(detections, maximum)
        matches = match(found, self.objects, np.array([[0.0, np.inf]]), np.array([0.5]))
        kept = ~matches.ignored[0, 0]
        order = np.flatnonzero(kept)[np.argsort(-found.score[kept], kind="stable")]
        scores, right = found.score[order], matches.matched[0, 0][order].cumsum()
        # 2 TP / (detections + objects); of equal scores all are above the threshold.
        f1 = 2 * right / (np.arange(1, len(order) + 1) + (~self.objects.crowd).sum())
        ends = np.flatnonzero(np.r_[scores[1:] != scores[:-1], True][: len(scores)])
        if not len(ends) or not right[-1]:
            return None
        best = ends[f1[ends].argmax()]
        return float(scores[best]), float(f1[best])

    def _counts(self, ranges: Array) -> Integers:
        """[C, A] objects of each class that count in each area range."""
        counted = ~(self.objects.crowd | self.objects.outside(ranges))
        label, classes = self.objects.pair % len(self.names), len(self.names)
        return np.stack([np.bincount(label[area], minlength=classes) for area in counted], -1)

    def find(self, found: SplitDetections, maximum: int) -> Boxes:
        """SplitDetections by pair and falling score, the best ``maximum`` of each pair."""
        known = np.flatnonzero(np.isin(found.image_ids, self._image_ids))
        images = np.searchsorted(self._image_ids, found.image_ids[known])
        pair = images * len(self.names) + found.labels[known]
        order = np.lexsort((-found.scores[known], pair))
        order = order[ranks(pair[order]) < maximum]
        boxes = found.boxes_xyxy[known[order]]
        xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        return Boxes(
            pair=pair[order],
            xywh=xywh,
            area=xywh[:, 2] * xywh[:, 3],
            score=found.scores[known[order]],
            crowd=np.zeros(len(order), dtype=bool),
        )

    def _metrics(self, precision: Array, recall: Array) -> CocoMetrics:
        """Of ``_curves``."""
        whole, *by_area = np.moveaxis(precision, -1, 0)
        parts = (whole, whole[0], whole[5], *by_area, recall[:, :, 0, 0], recall[:, :, 0, 1])
        recalls = np.moveaxis(recall[..., 2], -1, 0)
        values = (_mean(part) for part in (*parts, *recalls))
        return CocoMetrics(
            values=dict(zip(COCO_NAMES, values, strict=True)),
            per_class={name: _mean(whole[:, :, k]) for k, name in enumerate(self.names)},
            precision=whole,
            images=self.images,
            objects=int((~self.objects.crowd).sum()),
        )


def _objects(records: Sequence[ImageRecord], classes: int) -> Boxes:
    """Annotations by (image, class) pair, in the file's order within a pair, as in COCO."""
    images = np.repeat(np.arange(len(records)), [len(record.labels) for record in records])
    pair = images * classes + np.concatenate([record.labels for record in records])
    order = np.argsort(pair, kind="stable")
    return Boxes(
        pair=pair[order],
        xywh=np.concatenate([record.boxes_xywh for record in records])[order],
        area=np.concatenate([record.areas for record in records])[order],
        score=np.zeros(len(order)),
        crowd=np.concatenate([record.crowd for record in records])[order],
    )


def _curves(
    detections: Boxes, matches: Matches, objects: Integers, recalls: Array, limits: Sequence[int]
) -> tuple[Array, Array]:
    """Precision over recall of all images together; -1 where a class has no objects.

    pycocotools walks along every curve in Python. Precision between two recalls of a curve peaks
    at true positives, so here only these are looked at, and results are its own to the last bit.

    Letters: C classes; A area ranges; T IoU thresholds; R recalls; M limits of detections.

    Args:
        detections: of C classes.
        matches: of the detections.
        objects: [C, A] numbers of those that count.
        recalls: [R] ascending.
        limits: M numbers of detections that count of each image and class, best first.

    Returns:
        [T, R, C, A] highest precision at this recall or a larger one, and [T, C, A, M] recall of
        all detections up to a limit.
    """
    classes, areas = objects.shape
    thresholds = matches.matched.shape[1]
    label = detections.pair % classes
    order = np.lexsort((-detections.score, label))  # stable: of equal scores images in order
    bounds = np.searchsorted(label[order], np.arange(classes + 1))
    rank = ranks(detections.pair)[order]
    precision = np.full((thresholds, len(recalls), classes, areas), -1.0)
    recall = np.full((thresholds, classes, areas, len(limits)), -1.0)
    for k, (first, last) in enumerate(pairwise(bounds.tolist())):
        mine = order[first:last]
        kept = ~matches.ignored.take(mine, -1)
        right = matches.matched.take(mine, -1) & kept
        precision[:, :, k] = _precisions(right, kept, objects[k], recalls)
        recall[:, k] = _recalls(right, rank[first:last], objects[k], limits)
    return precision, recall


def _recalls(right: Flags, rank: Integers, objects: Integers, limits: Sequence[int]) -> Array:
    """[T, A, M] of one class's detections [A, T, n]; ``rank`` [n] is that within the image."""
    area, threshold, index = right.nonzero()
    recall = np.zeros((*right.shape[1::-1], len(limits)))
    for m, limit in enumerate(limits):
        within = rank[index] < limit
        np.add.at(recall[..., m], (threshold[within], area[within]), 1)
    return np.where(objects[:, None] > 0, recall / np.maximum(objects, 1)[:, None], -1.0)


def _precisions(right: Flags, kept: Flags, objects: Integers, recalls: Array) -> Array:
    """[T, R, A] of one class's detections [A, T, n], best first: right ones, those that count."""
    areas, thresholds, _ = right.shape
    precision = np.zeros((thresholds, len(recalls), areas))
    positives = kept.cumsum(-1, dtype=np.int32)
    for a, t in np.ndindex(areas, thresholds):
        if not objects[a]:
            precision[t, :, a] = -1.0
            continue
        shown = positives[a, t, right[a, t]]
        true = np.arange(1.0, len(shown) + 1)
        peaks = np.maximum.accumulate((true / (shown + np.spacing(1)))[::-1])[::-1]
        reached = np.searchsorted(true / objects[a], recalls)
        inside = reached < len(peaks)
        precision[t, inside, a] = peaks[reached[inside]]
    return precision


def _mean(precision: Array) -> float | None:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else None


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

    pair: Integers
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


@dataclass(frozen=True)
class MatchedDetections:
    """Detections of a split and what became of them.

    Attributes:
        boxes: by pair and falling score, the best ``maximum`` of each pair.
        matches: of each.
        maximum: detections per image and class that count.
    """

    boxes: Boxes
    matches: Matches
    maximum: int


def ranks(pair: Integers) -> Integers:
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
    shape = (len(ranges), len(thresholds))
    matched = np.zeros((*shape, len(detections)), dtype=bool)
    ignored, free = np.zeros_like(matched), np.ones((*shape, len(objects)), dtype=bool)
    skipped = objects.crowd | objects.outside(ranges)
    least = np.minimum(thresholds, 1 - 1e-10)
    row, column, overlap = _candidates(detections, objects, least.min())
    place = ranks(row) + 1
    most = place.max(initial=0)
    rank = ranks(detections.pair)[row]
    order = np.argsort(rank, kind="stable")
    bounds = np.searchsorted(rank[order], np.unique(rank))
    for chosen in np.split(order, bounds[1:]) if len(order) else []:
        # One detection of each pair: no object is here twice.
        here, there = row[chosen], column[chosen]
        fits = free[:, :, there] & (overlap[chosen] >= least[:, None])
        wish = fits * (place[chosen] + most * ~skipped[:, there])[:, None]  # regular objects first
        starts = np.flatnonzero(np.r_[True, here[1:] != here[:-1]])
        best = np.maximum.reduceat(wish, starts, axis=-1)
        taken = fits & (wish == np.repeat(best, np.diff(np.r_[starts, len(here)]), axis=-1))
        free[:, :, there] &= ~(taken & ~objects.crowd[there])
        matched[:, :, here[starts]] = best > 0
        ignored[:, :, here[starts]] = (best > 0) & (best <= most)
    ignored |= ~matched & detections.outside(ranges)[:, None]
    return Matches(matched, ignored)


def _candidates(
    detections: Boxes, objects: Boxes, least: float
) -> tuple[Integers, Integers, Array]:
    """Detection, object of the same pair, and their overlap, where that is enough.

    The overlap is IoU, for crowds the share of the detection. Sorted by detection, then by
    overlap; of equal ones the last object comes last, which wins as in COCO.
    """
    pairs = np.intersect1d(detections.pair, objects.pair)
    bounds = [np.searchsorted(b.pair, pairs, s) for b in (detections, objects) for s in _SIDES]
    rows, columns, overlaps = [], [], []
    for first, last, begin, end in np.stack(bounds, 1).tolist():
        crowd = objects.crowd[begin:end].astype(np.uint8)
        found = mask.iou(detections.xywh[first:last], objects.xywh[begin:end], crowd)
        row, column = np.nonzero(found >= least)
        rows.append(row + first)
        columns.append(column + begin)
        overlaps.append(found[row, column])
    row, column = (np.concatenate([*parts, np.arange(0)]) for parts in (rows, columns))
    overlap = np.concatenate([*overlaps, np.zeros(0)])
    order = np.lexsort((column, overlap, row))
    return row[order], column[order], overlap[order]
