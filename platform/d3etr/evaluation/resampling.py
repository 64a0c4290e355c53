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

from d3etr.evaluation.coco_metrics import GroundTruth, MatchedDetections

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


def resampled_maps(truth: GroundTruth, found: MatchedDetections, times: Counts) -> Array:
    """[D] mAP of the image sets in which the image of place i occurs ``times[d, i]`` times.

    Equal to measuring each set anew: detections and objects of an image match as they did.

    Args:
        truth: of all images, places in ascending order of their ids.
        found: matched with it.
        times: [D, I].
    """
    objects, boxes, classes = truth.objects, found.boxes, len(truth.names)
    matched, ignored = found.matches.matched[0], found.matches.ignored[0]  # objects of every size
    recalls = Params("bbox").recThrs
    label, image = boxes.pair % classes, boxes.pair // classes
    order = np.lexsort((-boxes.score, label))
    bounds = np.searchsorted(label[order], np.arange(classes + 1))
    total, present = np.zeros(len(times)), np.zeros(len(times), dtype=np.int64)
    for k, (first, last) in enumerate(pairwise(bounds.tolist())):
        own = objects.pair[~objects.crowd & (objects.pair % classes == k)] // classes
        number = times[:, own].sum(1)
        mine = order[first:last]
        shown = times[:, image[mine]]
        kept = ~ignored[:, mine]
        right = matched[:, mine] & kept
        precision = _average_precisions(shown, right, kept, number, recalls)
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
    result, rows = np.zeros(len(shown)), np.arange(len(shown))[:, None]
    least = _least_found(number, recalls)
    apart = int(number.max(initial=0)) + 1  # rows become one ascending line of whole numbers
    every = shown.cumsum(1)
    for right_here, kept_here in zip(right, kept, strict=True):
        true = shown[:, right_here].cumsum(1)
        columns = true.shape[1]
        if not columns:
            continue
        # Few detections are neither right nor wrong, at most thresholds none.
        positives = every if kept_here.all() else np.where(kept_here, shown, 0).cumsum(1)
        precision = true / (positives[:, right_here] + np.spacing(1))
        peaks = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        line, wanted = (true + apart * rows).ravel(), (least + apart * rows).ravel()
        place = np.searchsorted(line, wanted).reshape(least.shape) - columns * rows
        inside = place < columns
        result += np.where(inside, peaks[rows, np.where(inside, place, 0)], 0.0).sum(1)
    return result / (len(right) * len(recalls))


def _least_found(number: Counts, recalls: Array) -> Counts:
    """[D, R] fewest of ``number`` [D] objects whose share is at least each recall."""
    different, back = np.unique(number, return_inverse=True)
    least = [np.searchsorted(np.arange(n + 1) / max(n, 1), recalls) for n in different.tolist()]
    return np.stack(least)[back]


@dataclass(frozen=True, eq=False)
class Resampled:
    """mAP of one contender's runs, which differ in their seed.

    Attributes:
        maps: [S] on the images as they are.
        drawn: [S, D] in each draw of images, the same draws for all runs and contenders.
    """

    maps: Array
    drawn: Array

    def below(self, mAP: float, drawn: Array) -> Resampled:
        """How far each run is below something without seeds, whose mAP in the draws is [D]."""
        return Resampled(mAP - self.maps, drawn - self.drawn)

    @property
    def of_seeds(self) -> float:
        """Variance of the mean over seeds, as far as seeds make it."""
        return float(np.var(self.maps, ddof=1)) / len(self.maps)

    @property
    def of_runs_images(self) -> float:
        """The part of it that other images would change: mistakes of one run on one image.

        Drawing images shows it a second time.
        """
        own = self.drawn - self.drawn.mean(0)
        seeds = len(self.maps)
        return float(np.nanvar(own, axis=1).sum()) / (seeds * (seeds - 1))


def over_seeds(ours: Array, theirs: Array | None = None) -> Interval:
    """Student's t interval of a mean over seeds, or of the difference of two.

    Seeds of two contenders are not paired: what a seed draws first, another method uses otherwise.

    Args:
        ours: [S] mAP; without bounds where S is 1.
        theirs: [S'] of the other contender.
    """
    groups = [np.asarray(each) for each in (ours, theirs) if each is not None]
    mean = float(groups[0].mean() - (groups[1].mean() if theirs is not None else 0.0))
    if any(len(each) < 2 for each in groups):
        return Interval(mean, -np.inf, np.inf)
    parts = [(float(np.var(each, ddof=1)) / len(each), len(each) - 1) for each in groups]
    return _around(mean, sum(variance for variance, _ in parts), _freedom(parts))


def over_images(ours: Resampled, theirs: Resampled | None = None) -> Interval:
    """The percentile interval over draws of images, of the mean of the same runs."""
    drawn, mean = ours.drawn.mean(0), float(ours.maps.mean())
    if theirs is not None:
        drawn, mean = drawn - theirs.drawn.mean(0), mean - float(theirs.maps.mean())
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def over_both(ours: Resampled, theirs: Resampled | None = None) -> Interval:
    """The interval for another set of images *and* other training runs.

    The variances of seeds and of images add up, less what both contain (two-way clustering;
    Cameron, Gelbach and Miller, 2011). The variance over draws of images counts as known, which
    the degrees of freedom of the seeds grow with (Satterthwaite).
    """
    groups = [each for each in (ours, theirs) if each is not None]
    mean, drawn = float(ours.maps.mean()), ours.drawn.mean(0)
    if theirs is not None:
        mean, drawn = mean - float(theirs.maps.mean()), drawn - theirs.drawn.mean(0)
    if any(len(each.maps) < 2 for each in groups):
        return Interval(mean, -np.inf, np.inf)
    of_images = float(np.nanvar(drawn))
    seeds = [(each.of_seeds, len(each.maps) - 1) for each in groups]
    of_seeds = sum(variance for variance, _ in seeds)
    twice = sum(each.of_runs_images for each in groups)
    total = max(of_seeds + of_images - twice, of_seeds, of_images)
    freedom = _freedom(seeds) * (total / of_seeds) ** 2 if of_seeds else np.inf
    return _around(mean, total, freedom)


def _freedom(parts: Sequence[tuple[float, int]]) -> float:
    """Degrees of freedom of a sum of variances, each with its own.

    Student's where both have as many seeds: there his interval hardly depends on whether both
    spread alike (of three seeds each, spreads of 1 to 2 make 95 % to 93.4 %), and it is narrower
    than Welch's, which holds for other numbers.
    """
    total = sum(variance for variance, _ in parts)
    if not total:
        return np.inf
    if len({freedom for _, freedom in parts}) == 1:
        return sum(freedom for _, freedom in parts)
    return total**2 / sum(v**2 / freedom for v, freedom in parts)


def _around(mean: float, variance: float, freedom: float) -> Interval:
    quantile = (1 + LEVEL) / 2
    factor = stats.norm.ppf(quantile) if np.isinf(freedom) else stats.t.ppf(quantile, freedom)
    half = float(factor * np.sqrt(variance))
    return Interval(mean, mean - half, mean + half)
