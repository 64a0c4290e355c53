"""COCO detection metrics by pycocotools, from plain arrays."""

from __future__ import annotations

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Array = NDArray[np.float64]

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
        image_ids: the images that count; None: all in the file.
        categories: (id, name) of each class, in the order of the detector's labels.
    """

    def __init__(
        self,
        annotations: Path,
        categories: Sequence[tuple[int, str]],
        image_ids: Sequence[int] | None = None,
    ) -> None:
        self._categories = tuple(categories)
        self._coco = _read(annotations)
        self._image_ids = list(self._coco.getImgIds() if image_ids is None else image_ids)

    def measure(self, detections: Array, maximum: int) -> CocoMetrics:
        """Measure detections.

        Args:
            detections: [n, 7]: image id, label, score, x1, y1, x2, y2 in pixels of the
                original image. The rows of an image are together.
            maximum: detections per image and class that count, best first.
        """
        evaluator = _Evaluator(self._coco, self._detections_by_image(detections))
        evaluator.params.imgIds = self._image_ids
        evaluator.params.catIds = [identity for identity, _ in self._categories]
        evaluator.params.maxDets = [maximum]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator.evaluate()
            evaluator.accumulate()
        return self._metrics(evaluator)

    def _detections_by_image(self, rows: Array) -> dict[tuple[int, int], list[dict[str, Any]]]:
        identities = [identity for identity, _ in self._categories]
        corners, sizes = rows[:, 3:5], rows[:, 5:7] - rows[:, 3:5]
        boxes = np.concatenate([corners, sizes], axis=1).tolist()
        columns = (rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64), rows[:, 2])
        found: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        lists = zip(*(column.tolist() for column in columns), boxes, strict=True)
        for number, (image, label, score, box) in enumerate(lists, start=1):
            found[image, identities[label]].append(
                {"id": number, "score": score, "bbox": box, "area": box[2] * box[3]}
            )
        return found

    def _metrics(self, evaluator: _Evaluator) -> CocoMetrics:
        precision: Array = evaluator.eval["precision"][..., 0]  # [T, 101, C, areas]
        order = [evaluator.params.catIds.index(i) for i, _ in self._categories]
        precision = precision[:, :, order]
        by_area = [_mean(precision[..., area]) for area in range(len(AREAS))]
        whole = precision[..., 0]
        return CocoMetrics(
            mAP=by_area[0],
            AP50=_mean(whole[0]),
            AP75=_mean(whole[5]),
            AP_small=by_area[1],
            AP_medium=by_area[2],
            AP_large=by_area[3],
            per_class={name: _mean(whole[:, :, k]) for k, (_, name) in enumerate(self._categories)},
            precision=whole,
            images=len(self._image_ids),
            objects=evaluator.objects,
        )


class _Evaluator(COCOeval):  # type: ignore[misc]
    """COCOeval that takes detections as they are, and skips area ranges without objects."""

    def __init__(
        self, truth: COCO, detections: dict[tuple[int, int], list[dict[str, Any]]]
    ) -> None:
        super().__init__(truth, None, "bbox")
        self._detections = detections
        self._inhabited: set[tuple[int, tuple[float, float]]] = set()
        self.objects = 0

    def _prepare(self) -> None:
        p = self.params
        truth = self.cocoGt.loadAnns(self.cocoGt.getAnnIds(imgIds=p.imgIds, catIds=p.catIds))
        self._dts = self._detections
        self._gts = defaultdict(list)
        for entry in truth:
            entry["ignore"] = entry["iscrowd"]
            self._gts[entry["image_id"], entry["category_id"]].append(entry)
        counted = [entry for entry in truth if not entry["ignore"]]
        self.objects = len(counted)
        self._inhabited = {
            (entry["category_id"], (low, high))
            for entry in counted
            for low, high in p.areaRng
            if low <= entry["area"] <= high
        }

    def evaluateImg(  # noqa: N802 - the name that pycocotools calls
        self,
        imgId: int,  # noqa: N803
        catId: int,  # noqa: N803
        aRng: Sequence[float],  # noqa: N803
        maxDet: int,  # noqa: N803
    ) -> dict[str, Any] | None:
        # Without objects of this class and size the precision is -1 whatever was detected.
        if (catId, (aRng[0], aRng[1])) not in self._inhabited:
            return None
        result: dict[str, Any] | None = super().evaluateImg(imgId, catId, aRng, maxDet)
        return result


def _read(annotations: Path) -> COCO:
    """The file as a COCO object, with what COCO takes for granted filled in where it lacks."""
    coco = COCO()
    coco.dataset = json.loads(annotations.read_text(encoding="utf-8"))
    # Numbered anew from 1: pycocotools takes a match with an annotation of id 0 for none.
    for number, entry in enumerate(coco.dataset.setdefault("annotations", []), start=1):
        entry["id"] = number
        entry.setdefault("iscrowd", 0)
        entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _mean(precision: Array) -> float | None:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else None
