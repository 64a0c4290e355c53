"""Runs that differ in their seed only, as one, and such groups at equal time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

from d3etr.tracking.compare.runs import FinishedRun

EQUAL_TIME = 0.1
"""Costs that differ by less than this share count as equal."""


@dataclass(frozen=True)
class Spread:
    """Mean over runs, and the sample deviation; None for a single run."""

    mean: float
    deviation: float | None
    runs: int


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seed only.

    Attributes:
        runs: at least one, by seed.
        prefix: of the metrics' keys in the summaries: "" (validation) or "test/".
        label: unique in the comparison.
    """

    runs: tuple[FinishedRun, ...]
    prefix: str
    label: str

    @property
    def title(self) -> str:
        """Teacher, plain student, D3ETR student."""
        return self.runs[0].title

    @property
    def seeds(self) -> tuple[int, ...]:
        """Their seeds."""
        return tuple(run.config.run.seed for run in self.runs)

    def metric(self, name: str) -> Spread | None:
        """A metric of the split that is compared, as a fraction."""
        return self.cost(self.prefix + name)

    def cost(self, name: str) -> Spread | None:
        """Another number of the summaries."""
        return _spread(run.number(name) for run in self.runs)

    def classes(self) -> dict[str, Spread | None]:
        """Class name -> average precision."""
        prefix = f"{self.prefix}AP/"
        names = [key.removeprefix(prefix) for key in self.runs[0].summary if key.startswith(prefix)]
        return {name: self.metric(f"AP/{name}") for name in names}

    def curve(self) -> dict[int, Spread]:
        """Optimiser step -> validation mAP there, at the steps where all runs were measured."""
        measured = [run.curve for run in self.runs if run.curve]
        shared = set.intersection(*map(set, measured)) if measured else set()
        if not shared:  # measured at different steps: a mean would be of nothing
            measured = measured[:1]
            shared = set(*measured)
        spreads = {step: _spread(each[step] for each in measured) for step in sorted(shared)}
        return {step: spread for step, spread in spreads.items() if spread is not None}

    def mAP_after(self, share: float) -> float | None:
        """Validation mAP after a share of the run, between measurements on a straight line."""
        curve, step = self.curve(), share * _mean(self.cost("steps"))
        if not curve or not step or step < min(curve):
            return None
        return float(np.interp(step, list(curve), [at.mean for at in curve.values()]))

    def gain_over(self, other: RunGroup) -> Spread | None:
        """Gain in mAP over another group; seed by seed where both have the same seeds."""
        ours, theirs = self.metric("mAP"), other.metric("mAP")
        if ours is None or theirs is None:
            return None
        if self.seeds != other.seeds:
            return Spread(ours.mean - theirs.mean, None, min(ours.runs, theirs.runs))
        key = f"{self.prefix}mAP"
        pairs = [
            (one.number(key), two.number(key))
            for one, two in zip(self.runs, other.runs, strict=True)
        ]
        return _spread(one - two for one, two in pairs if one is not None and two is not None)


@dataclass(frozen=True)
class EqualTime:
    """A distilled student and the strongest plain one within the same time.

    Attributes:
        group: the distilled student.
        rival: the plain student.
        seconds: what each cost, in this order; of an estimate, both up to the same time.
        mAP: of each, fractions.
        gain: of the distilled one.
        estimated: validation mAP read from curves, because no plain student had as much time;
            learning rates had not come down there.
    """

    group: RunGroup
    rival: RunGroup
    seconds: tuple[float, float]
    mAP: tuple[float, float]
    gain: Spread | None
    estimated: bool


def strongest_plain(group: RunGroup, rivals: Sequence[RunGroup], clock: str) -> EqualTime | None:
    """The group and the strongest of its rivals within its time.

    Args:
        group: a distilled student.
        rivals: plain ones.
        clock: where summaries have the time.

    Returns:
        None where there is no rival, or none whose curve can be read at the shorter one's time.
    """
    equal = [rival for rival in rivals if _costs_as_much(group, rival, clock)]
    # What a cheaper one reached is reached within that time as well; alone it says little, unless
    # it is the better one.
    cheaper = [each for each in rivals if _mean(each.cost(clock)) < _mean(group.cost(clock))]
    least = -math.inf if equal else _mean(group.metric("mAP"))
    within = equal + [each for each in cheaper if _mean(each.metric("mAP")) > least]
    rows = [_as_they_are(group, rival, clock) for rival in within]
    if not rows:
        found = [_from_curves(group, rival, clock) for rival in rivals]
        rows = [row for row in found if row is not None]
    return max(rows, key=lambda row: row.mAP[1], default=None)


def _costs_as_much(group: RunGroup, rival: RunGroup, clock: str) -> bool:
    ours, theirs = (_mean(each.cost(clock)) for each in (group, rival))
    return abs(ours - theirs) <= EQUAL_TIME * max(ours, theirs)


def _as_they_are(group: RunGroup, rival: RunGroup, clock: str) -> EqualTime:
    seconds = (_mean(group.cost(clock)), _mean(rival.cost(clock)))
    mAP = (_mean(group.metric("mAP")), _mean(rival.metric("mAP")))
    return EqualTime(group, rival, seconds, mAP, group.gain_over(rival), False)


def _from_curves(group: RunGroup, rival: RunGroup, clock: str) -> EqualTime | None:
    """Both when the shorter one ended."""
    ours, theirs = (_mean(each.cost(clock)) for each in (group, rival))
    shared = min(ours, theirs)
    first, second = group.mAP_after(shared / ours), rival.mAP_after(shared / theirs)
    if first is None or second is None:
        return None
    gain = Spread(first - second, None, 1)
    return EqualTime(group, rival, (shared, shared), (first, second), gain, True)


def _spread(numbers: Iterable[float | None]) -> Spread | None:
    values = [number for number in numbers if number is not None]
    if not values:
        return None
    return Spread(mean(values), stdev(values) if len(values) > 1 else None, len(values))


def _mean(spread: Spread | None) -> float:
    return 0.0 if spread is None else spread.mean
