"""How sure a difference in mAP is: images drawn again, and seeds.

mAP is no mean over images, so its spread over images is found by drawing them again, with
replacement (the bootstrap; Efron, 1979). Both contenders see the same draws: what makes an image
hard for one makes it hard for the other. Seeds are few and their spread is that of training:
Student's t.

Letters: D draws · I images · S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import Params
from scipy import stats

from d3etr.evaluation.coco_metrics import GroundTruth, SplitDetections, match

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

LEVEL = 0.95
"""Share of repetitions in which an interval holds the true value."""


@dataclass(frozen=True)
class Interval:
    """An estimate, and the interval around it.

    Attributes:
        mean: the estimate.
        low: the lower end; minus infinity where nothing bounds it.
        high: the upper end.
    """

    mean: float
    low: float
    high: float


def draw_images(images: int, draws: int, seed: int) -> Counts:
    """[D, I] how often each image comes in each draw of I images with replacement."""
    generator = np.random.default_rng(seed)
    chances = np.full(images, 1 / images)
    return generator.multinomial(images, chances, size=draws).astype(np.int64)


def resampled_maps(
    truth: GroundTruth, detections: SplitDetections, maximum: int, times: Counts
) -> Array:
    """[D] mAP of the image sets in which the image of place i occurs ``times[d, i]`` times.

    Equal to measuring each set anew: detections and objects of an image match as they did.

    Args:
        truth: of all images, places in ascending order of their ids.
        detections: those of other images do not count.
        maximum: detections per image and class that count, best first.
        times: [D, I].
    """
    params, classes = Params("bbox"), len(truth.names)
    found, objects = truth.find(detections, maximum), truth.objects
    every_size = np.array(params.areaRng[:1], dtype=np.float64)
    matches = match(found, objects, every_size, params.iouThrs)
    label, image = found.pair % classes, found.pair // classes
    order = np.lexsort((-found.score, label))
    bounds = np.searchsorted(label[order], np.arange(classes + 1))
    total, present = np.zeros(len(times)), np.zeros(len(times), dtype=np.int64)
    for k, (first, last) in enumerate(pairwise(bounds.tolist())):
        own = objects.pair[~objects.crowd & (objects.pair % classes == k)] // classes
        number = times[:, own].sum(1)
        mine = order[first:last]
        shown = times[:, image[mine]]
        kept = ~matches.ignored[0][:, mine]
        right = matches.matched[0][:, mine] & kept
        precision = _average_precisions(shown, right, kept, number, params.recThrs)
        total += np.where(number > 0, precision, 0.0)
        present += number > 0
    maps: Array = np.where(present > 0, total / np.maximum(present, 1), np.nan)
    return maps


def _average_precisions(
    shown: Counts, right: NDArray[np.bool_], kept: NDArray[np.bool_], number: Counts, recalls: Array
) -> Array:
    """[D] mean precision of one class over thresholds and recalls.

    Args:
        shown: [D, n] how often each detection occurs, best first.
        right: [T, n] true positives.
        kept: [T, n] those that count.
        number: [D] objects.
        recalls: [R].
    """
    result = np.zeros(len(shown))
    for right_here, kept_here in zip(right, kept, strict=True):
        true = shown[:, right_here].cumsum(1)
        if not true.shape[1]:
            continue
        positives = np.where(kept_here, shown, 0).cumsum(1)[:, right_here]
        precision = true / (positives + np.spacing(1))
        peaks = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for d in np.flatnonzero(number > 0):
            reached = np.searchsorted(true[d] / number[d], recalls)
            result[d] += peaks[d, reached[reached < true.shape[1]]].sum()
    return result / (len(right) * len(recalls))


def over_seeds(gains: Sequence[float]) -> Interval:
    """Student's t interval of the mean of [S] gains; without bounds for a single seed."""
    mean = float(np.mean(gains))
    if len(gains) < 2:
        return Interval(mean, -np.inf, np.inf)
    half = _half_width(float(np.var(gains, ddof=1)) / len(gains), len(gains) - 1)
    return Interval(mean, mean - half, mean + half)


def over_images(drawn: Array) -> Interval:
    """The percentile interval of [D] gains over draws of images."""
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(np.nanmean(drawn)), float(low), float(high))


def over_both(gains: Sequence[float], drawn: Array) -> Interval:
    """The interval for another set of images *and* another training run.

    Both variances add up, with Welch's degrees of freedom: that of the mean over seeds, and that
    of the mean gain over draws of images, which count as known.

    Args:
        gains: [S] on the images as they are.
        drawn: [D] mean gain over seeds in each draw.
    """
    seeds = len(gains)
    mean = float(np.mean(gains))
    if seeds < 2:
        return Interval(mean, -np.inf, np.inf)
    of_seeds, of_images = float(np.var(gains, ddof=1)) / seeds, float(np.nanvar(drawn))
    total = of_seeds + of_images
    freedom = np.inf if of_seeds == 0 else total**2 / (of_seeds**2 / (seeds - 1))
    half = _half_width(total, freedom)
    return Interval(mean, mean - half, mean + half)


def _half_width(variance: float, freedom: float) -> float:
    quantile = (1 + LEVEL) / 2
    factor = stats.norm.ppf(quantile) if np.isinf(freedom) else stats.t.ppf(quantile, freedom)
    return float(factor * np.sqrt(variance))
