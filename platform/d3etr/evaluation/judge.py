"""Whether a contender beats the strongest student that was not distilled, and how sure that is.

Choices are made on validation, what is said is said of another image set: a rival that was chosen
by the numbers it is judged by would look better than it is.

Letters: D draws of images · S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

from d3etr.errors import UserError
from d3etr.evaluation.coco_metrics import CocoMetrics, GroundTruth, SplitDetections
from d3etr.evaluation.resampling import (
    Interval,
    Resampled,
    draw_images,
    over_both,
    over_images,
    over_seeds,
    resampled_maps,
)

Answer = Literal["gain", "loss", "open"]
DRAWS = 1000
"""Of images; more change the last digit."""
FEWEST_SEEDS = 2
SIZES = ("AP_small", "AP_medium", "AP_large")


@dataclass(frozen=True, eq=False)
class Contender:
    """The finished runs of one way to train the student.

    Attributes:
        name: for people.
        distilled: whether a teacher taught it; the others are rivals.
        validation: [S] mAP on the split that choices are made on, in [0, 1].
        detections: S, on the split that is judged on.
    """

    name: str
    distilled: bool
    validation: tuple[float, ...]
    detections: tuple[SplitDetections, ...]


@dataclass(frozen=True)
class Difference:
    """A difference in mAP with its intervals.

    Attributes:
        seeds: for other training runs and the same images.
        images: for other images and the same runs.
        both: for other runs and other images.
    """

    seeds: Interval
    images: Interval
    both: Interval

    @property
    def answer(self) -> Answer:
        """Open where the interval over both holds 0: the two cannot be told apart."""
        if self.both.low > 0:
            return "gain"
        return "loss" if self.both.high < 0 else "open"


@dataclass(frozen=True)
class Standing:
    """What a contender reached.

    Attributes:
        name: of the contender.
        distilled: whether a teacher taught it.
        validation: mean mAP over seeds on validation.
        maps: [S] mAP of each seed.
        mAP: their mean with its intervals.
        sizes: mean AP of small, medium and large objects; None where there are none.
        classes: class name -> mean AP.
        gain: over the rival; None of the rival itself.
        change: over the recipe, of other distilled contenders where it is one; else None.
    """

    name: str
    distilled: bool
    validation: float
    maps: tuple[float, ...]
    mAP: Difference
    sizes: Mapping[str, float | None]
    classes: Mapping[str, float | None]
    gain: Difference | None
    change: Difference | None = None


@dataclass(frozen=True)
class Judgement:
    """All contenders side by side.

    Attributes:
        standings: in the contenders' order.
        rival: name of the strongest contender that was not distilled, by validation.
        teacher: the teacher's mAP; None where it was not measured.
        lead: the teacher's over the rival.
        behind: names of those whose whole interval lies below the contender that is best on
            validation.
    """

    standings: tuple[Standing, ...]
    rival: str
    behind: tuple[str, ...] = ()
    teacher: float | None = None
    lead: Difference | None = None

    def of(self, name: str) -> Standing:
        """The contender of that name."""
        return next(each for each in self.standings if each.name == name)

    @property
    def best_distilled(self) -> Standing | None:
        """The distilled contender that is best on validation."""
        distilled = [each for each in self.standings if each.distilled]
        return max(distilled, key=lambda each: each.validation, default=None)


def judge(
    truth: GroundTruth,
    contenders: Sequence[Contender],
    teacher: SplitDetections | None = None,
    *,
    recipe: str | None = None,
    maximum: int = 100,
    draws: int = DRAWS,
    seed: int = 0,
) -> Judgement:
    """Judge contenders on one image set.

    Args:
        truth: of the split that is judged on.
        contenders: at least one that was not distilled.
        teacher: what the teacher detects there.
        recipe: name of the contender that the other distilled ones are compared with, too.
        maximum: detections per image and class that count.
        draws: D; all contenders see the same ones.
        seed: of the draws.

    Raises:
        UserError: a contender has fewer than two seeds, or none is a rival.
    """
    _require_seeds(contenders)
    rivals = [each for each in contenders if not each.distilled]
    if not rivals:
        raise UserError("every contender is distilled; expected a plain student to compare with")
    rival = max(rivals, key=lambda each: fmean(each.validation))
    times = draw_images(truth.images, draws, seed)
    measured, resampled = dict[str, list[CocoMetrics]](), dict[str, Resampled]()
    for each in contenders:
        found = [truth.match(detections, maximum) for detections in each.detections]
        measured[each.name] = [truth.metrics(one) for one in found]
        resampled[each.name] = Resampled(
            np.array([_map(metrics) for metrics in measured[each.name]]),
            np.stack([resampled_maps(truth, one, times) for one in found]),
        )
    theirs, unchanged = resampled[rival.name], resampled.get(recipe or "")
    standings = tuple(
        _standing(
            c,
            measured[c.name],
            resampled[c.name],
            None if c.name == rival.name else theirs,
            unchanged if c.distilled and c.name != recipe else None,
        )
        for c in contenders
    )
    best = resampled[max(contenders, key=lambda each: fmean(each.validation)).name]
    behind = _behind(resampled, best)
    if teacher is None:
        return Judgement(standings, rival.name, behind)
    taught = truth.match(teacher, maximum)
    reached = _map(truth.metrics(taught))
    lead = _difference(theirs.below(reached, resampled_maps(truth, taught, times)))
    return Judgement(standings, rival.name, behind, reached, lead)


def _require_seeds(contenders: Sequence[Contender]) -> None:
    for each in contenders:
        if len(each.detections) < FEWEST_SEEDS:
            raise UserError(
                f"contender '{each.name}' has {len(each.detections)} finished run: one seed says "
                f"nothing of another. Expected at least {FEWEST_SEEDS} seeds"
            )


def _behind(resampled: Mapping[str, Resampled], best: Resampled) -> tuple[str, ...]:
    return tuple(
        name
        for name, ours in resampled.items()
        if ours is not best and _difference(ours, best).answer == "loss"
    )


def _standing(
    contender: Contender,
    metrics: Sequence[CocoMetrics],
    ours: Resampled,
    rival: Resampled | None,
    recipe: Resampled | None,
) -> Standing:
    return Standing(
        contender.name,
        contender.distilled,
        fmean(contender.validation),
        tuple(ours.maps.tolist()),
        _difference(ours),
        {name: _mean([each.values[name] for each in metrics]) for name in SIZES},
        {name: _mean([each.per_class[name] for each in metrics]) for name in metrics[0].per_class},
        None if rival is None else _difference(ours, rival),
        None if recipe is None else _difference(ours, recipe),
    )


def _difference(ours: Resampled, theirs: Resampled | None = None) -> Difference:
    seeds = over_seeds(ours.maps, None if theirs is None else theirs.maps)
    return Difference(seeds, over_images(ours, theirs), over_both(ours, theirs))


def _map(metrics: CocoMetrics) -> float:
    mAP = metrics.values["mAP"]
    if mAP is None:
        raise UserError("the split that is judged on holds no objects: there is no mAP to compare")
    return mAP


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
