"""COCO detection metrics, those of pycocotools, from plain arrays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import Params

from d3etr.training.coco_curves import Curves, curves
from d3etr.training.coco_matching import Boxes, match, ranks

Array = NDArray[np.float64]

COCO_NAMES = (
    *("mAP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR", "AR_small", "AR_medium", "AR_large"),
)
"""The twelve numbers, in pycocotools' order."""


@dataclass(frozen=True)
class CocoMetrics:
    """What COCO says about a set of detections. Fractions in [0, 1]; None: no such objects.

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


class GroundTruth:
    """The original annotations of an image set, crowds included, ready to be measured against.

    Args:
        annotations: COCO detection JSON.
        categories: (id, name) of each class, in the order of the detector's labels.
        image_ids: the images that count; None: all in the file.
    """

    def __init__(
        self,
        annotations: Path,
        categories: Sequence[tuple[int, str]],
        image_ids: Sequence[int] | None = None,
    ) -> None:
        content = json.loads(annotations.read_bytes())
        self._names = [name for _, name in categories]
        ids = image_ids if image_ids is not None else [i["id"] for i in content["images"]]
        self._image_ids = np.unique(np.array(ids, dtype=np.int64))
        self._objects = self._read(content.get("annotations", []), [i for i, _ in categories])

    def measure(self, detections: Array, maximum: int) -> CocoMetrics:
        """Measure detections.

        Args:
            detections: [n, 7]: image id, label, score, x1, y1, x2, y2 in pixels of the
                original image; those of other images do not count.
            maximum: detections per image and class that count, best first.
        """
        params = Params("bbox")
        found = self._detections(detections, maximum)
        ranges = np.array(params.areaRng, dtype=np.float64)
        matches = match(found, self._objects, ranges, params.iouThrs)
        counts = self._counts(ranges)
        return self._metrics(curves(found, matches, counts, params.recThrs, (1, 10, maximum)))

    def _counts(self, ranges: Array) -> NDArray[np.int64]:
        """[C, A] objects of each class that count in each area range."""
        counted = ~(self._objects.crowd | self._objects.outside(ranges))
        label, classes = self._objects.pair % len(self._names), len(self._names)
        return np.stack([np.bincount(label[area], minlength=classes) for area in counted], -1)

    def _read(self, entries: Sequence[dict[str, Any]], category_ids: Sequence[int]) -> Boxes:
        """Objects, with what COCO takes for granted filled in where it lacks."""
        classes = {identity: index for index, identity in enumerate(category_ids)}
        images = {identity: index for index, identity in enumerate(self._image_ids.tolist())}
        counted = [e for e in entries if e["image_id"] in images and e["category_id"] in classes]
        boxes = np.array([e["bbox"] for e in counted], dtype=np.float64).reshape(-1, 4)
        areas = [
            e["bbox"][2] * e["bbox"][3] if e.get("area") is None else e["area"] for e in counted
        ]
        pairs = [images[e["image_id"]] * len(classes) + classes[e["category_id"]] for e in counted]
        order = np.argsort(np.array(pairs, dtype=np.int64), kind="stable")
        return Boxes(
            pair=np.array(pairs, dtype=np.int64)[order],
            xywh=boxes[order],
            area=np.array(areas, dtype=np.float64)[order],
            score=np.zeros(len(counted)),
            crowd=np.array([bool(e.get("iscrowd", 0)) for e in counted], dtype=bool)[order],
        )

    def _detections(self, rows: Array, maximum: int) -> Boxes:
        """Detections by pair and falling score, the best ``maximum`` of each pair."""
        rows = rows[np.isin(rows[:, 0], self._image_ids)]
        images = np.searchsorted(self._image_ids, rows[:, 0].astype(np.int64))
        pair = images * len(self._names) + rows[:, 1].astype(np.int64)
        order = np.lexsort((-rows[:, 2], pair))
        order = order[ranks(pair[order]) < maximum]
        xywh = np.concatenate([rows[:, 3:5], rows[:, 5:7] - rows[:, 3:5]], axis=1)[order]
        return Boxes(
            pair=pair[order],
            xywh=xywh,
            area=xywh[:, 2] * xywh[:, 3],
            score=rows[order, 2],
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


def _mean(precision: Array) -> float | None:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else None
