"""COCO's precision at 101 recalls, and recall, from detections that are matched.

pycocotools walks along every curve in Python. Precision between two recalls of a curve peaks at
true positives, so here only these are looked at, and results are its own to the last bit.

Letters: C classes · A area ranges · T IoU thresholds · R recalls · M limits of detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from d3etr.evaluation.coco_matching import Boxes, Matches, ranks

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Curves:
    """Of every class, -1 where it has no objects of the area range.

    Attributes:
        precision: [T, R, C, A] the highest at this recall or a larger one.
        recall: [T, C, A, M] of all detections up to a limit.
    """

    precision: Array
    recall: Array


def curves(
    detections: Boxes,
    matches: Matches,
    objects: Counts,
    recalls: Array,
    limits: Sequence[int],
) -> Curves:
    """Precision and recall of all images together.

    Args:
        detections: of C classes.
        matches: what became of them.
        objects: [C, A] numbers of those that count.
        recalls: [R] ascending.
        limits: M numbers of detections that count of each image and class, best first.
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
    return Curves(precision, recall)


def _recalls(right: Flags, rank: Counts, objects: Counts, limits: Sequence[int]) -> Array:
    """[T, A, M] of one class's detections [A, T, n]; ``rank`` [n] is that within the image."""
    area, threshold, index = right.nonzero()
    recall = np.zeros((*right.shape[1::-1], len(limits)))
    for m, limit in enumerate(limits):
        within = rank[index] < limit
        np.add.at(recall[..., m], (threshold[within], area[within]), 1)
    return np.where(objects[:, None] > 0, recall / np.maximum(objects, 1)[:, None], -1.0)


def _precisions(right: Flags, kept: Flags, objects: Counts, recalls: Array) -> Array:
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
