"""COCO detection metrics by pycocotools, from plain arrays."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval, Params

from d3etr.training.coco_matching import Boxes, Matches, match, ranks

Array = NDArray[np.float64]
Entry = dict[str, NDArray[Any]]

AREAS = ("all", "small", "medium", "large")


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
    per_class: dict[str, float | None]
    precision: Array
    images: int
    objects: int

    def as_dict(self) -> dict[str, float]:
        """Name -> value, without those that no object stands behind: never a NaN or a -1."""
        names = ("mAP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
        values = {name: getattr(self, name) for name in names}
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
        entries = self._entries(found, matches, self._objects.crowd | self._objects.outside(ranges))
        return self._metrics(_precision(params, entries, len(self._names)))

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

    def _entries(self, found: Boxes, matches: Matches, skipped: NDArray[np.bool_]) -> list[Entry]:
        """One entry per class and area range, over all images."""
        found_class = found.pair % len(self._names)
        true_class = self._objects.pair % len(self._names)
        entries = []
        for k in range(len(self._names)):
            mine, truth = np.flatnonzero(found_class == k), np.flatnonzero(true_class == k)
            for area in range(len(AREAS)):
                entries.append(
                    {
                        "dtScores": found.score[mine],
                        "dtMatches": matches.matched[area][:, mine],
                        "dtIgnore": matches.ignored[area][:, mine],
                        "gtIgnore": skipped[area, truth],
                    }
                )
        return entries

    def _metrics(self, precision: Array) -> CocoMetrics:
        by_area = [_mean(precision[..., area]) for area in range(len(AREAS))]
        whole = precision[..., 0]
        return CocoMetrics(
            mAP=by_area[0],
            AP50=_mean(whole[0]),
            AP75=_mean(whole[5]),
            AP_small=by_area[1],
            AP_medium=by_area[2],
            AP_large=by_area[3],
            per_class={name: _mean(whole[:, :, k]) for k, name in enumerate(self._names)},
            precision=whole,
            images=len(self._image_ids),
            objects=int((~self._objects.crowd).sum()),
        )


def _precision(params: Params, entries: list[Entry], classes: int) -> Array:
    """[T, 101, C, areas] by pycocotools, which takes all images together for one."""
    params.imgIds, params.catIds = [0], list(range(classes))
    params.maxDets = [sys.maxsize]  # what is too much per image is gone already
    evaluator = COCOeval()
    evaluator.params, evaluator._paramsEval, evaluator.evalImgs = params, params, entries
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
    precision: Array = evaluator.eval["precision"][..., 0]
    return precision


def _mean(precision: Array) -> float | None:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else None
