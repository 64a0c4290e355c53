"""COCO detection metrics, those of pycocotools, from plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import Params

from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit
from d3etr.evaluation.coco_curves import Curves, curves
from d3etr.evaluation.coco_matching import Boxes, match, ranks

Array = NDArray[np.float64]

Integers = NDArray[np.int64]

COCO_NAMES = (
    *("mAP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR", "AR_small", "AR_medium", "AR_large"),
)
"""The twelve numbers, in pycocotools' order."""


@dataclass(frozen=True)
class CocoMetrics:
    """COCO's metrics of a set of detections. Fractions in [0, 1]; None: no such objects.

    Attributes:
        mAP: mean average precision over IoU 0.5, 0.55, .. 0.95 and classes.
        AP50: the same at IoU 0.5.
        AP75: the same at IoU 0.75.
        AP_small: the same for objects under 32^2 pixels.
        AP_medium: the same from 32^2 to 96^2 pixels.
        AP_large: the same above 96^2 pixels.
        AR1: mean recall over IoU 0.5, 0.55, .. 0.95 and classes, of the best detection of
            each image and class.
        AR10: the same of the best ten.
        AR: the same of all that count: COCO's AR100 where these are 100.
        AR_small: the same for objects under 32^2 pixels.
        AR_medium: the same from 32^2 to 96^2 pixels.
        AR_large: the same above 96^2 pixels.
        per_class: class name -> average precision.
        precision: [10 IoU thresholds, 101 recalls, C], -1 for classes without objects.
        images: number of images.
        objects: number of objects that count (no crowds).
    """

    mAP: float | None
    AP50: float | None
    AP75: float | None
    AP_small: float | None
    AP_medium: float | None
    AP_large: float | None
    AR1: float | None
    AR10: float | None
    AR: float | None
    AR_small: float | None
    AR_medium: float | None
    AR_large: float | None
    per_class: dict[str, float | None]
    precision: Array
    images: int
    objects: int

    def as_dict(self) -> dict[str, float]:
        """Name -> value, without those that no object stands behind: never a NaN or a -1."""
        values = {name: getattr(self, name) for name in COCO_NAMES}
        values |= {f"AP/{name}": value for name, value in self.per_class.items()}
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
    """

    def __init__(self, split: DetectionSplit) -> None:
        self._names = [category.name for category in split.categories]
        records = sorted(split.records, key=lambda record: record.id)
        self._image_ids = np.array([record.id for record in records], dtype=np.int64)
        self._objects = _objects(records, len(self._names))

    def measure(self, detections: SplitDetections, maximum: int) -> CocoMetrics:
        """Measure detections.

        Args:
            detections: those of images outside of the split do not count.
            maximum: detections per image and class that count, best first.
        """
        params = Params("bbox")
        found = self._detections(detections, maximum)
        ranges = np.array(params.areaRng, dtype=np.float64)
        matches = match(found, self._objects, ranges, params.iouThrs)
        counts = self._counts(ranges)
        return self._metrics(curves(found, matches, counts, params.recThrs, (1, 10, maximum)))

    def _counts(self, ranges: Array) -> Integers:
        """[C, A] objects of each class that count in each area range."""
        counted = ~(self._objects.crowd | self._objects.outside(ranges))
        label, classes = self._objects.pair % len(self._names), len(self._names)
        return np.stack([np.bincount(label[area], minlength=classes) for area in counted], -1)

    def _detections(self, found: SplitDetections, maximum: int) -> Boxes:
        """SplitDetections by pair and falling score, the best ``maximum`` of each pair."""
        known = np.flatnonzero(np.isin(found.image_ids, self._image_ids))
        images = np.searchsorted(self._image_ids, found.image_ids[known])
        pair = images * len(self._names) + found.labels[known]
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

    def _metrics(self, found: Curves) -> CocoMetrics:
        whole, *by_area = np.moveaxis(found.precision, -1, 0)
        recall = found.recall
        return CocoMetrics(
            mAP=_mean(whole),
            AP50=_mean(whole[0]),
            AP75=_mean(whole[5]),
            AP_small=_mean(by_area[0]),
            AP_medium=_mean(by_area[1]),
            AP_large=_mean(by_area[2]),
            AR1=_mean(recall[:, :, 0, 0]),
            AR10=_mean(recall[:, :, 0, 1]),
            AR=_mean(recall[:, :, 0, 2]),
            AR_small=_mean(recall[:, :, 1, 2]),
            AR_medium=_mean(recall[:, :, 2, 2]),
            AR_large=_mean(recall[:, :, 3, 2]),
            per_class={name: _mean(whole[:, :, k]) for k, name in enumerate(self._names)},
            precision=whole,
            images=len(self._image_ids),
            objects=int((~self._objects.crowd).sum()),
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


def _mean(precision: Array) -> float | None:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else None
