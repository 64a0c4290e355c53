"""Distilled students against plain ones that took as long: equal steps are no fair measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d3etr.tracking.compare.comparison import Comparison, RunGroup, Spread

CLOCKS: Mapping[str, str] = {
    "training_device_seconds": "GPU time of training steps",
    "training_cpu_seconds": "CPU time of training steps",
    "training_seconds": "wall time of training steps",
}
"""Where a summary has what training cost, the most reliable first: wall time is no measure on a
machine that others use too."""
TOLERANCE = 0.1
"""Costs that differ by less than this share count as equal."""


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

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "group": self.group.label,
            "rival": self.rival.label,
            "seconds": list(self.seconds),
            "mAP": list(self.mAP),
            "gain": self.mAP[0] - self.mAP[1],
            "estimated": self.estimated,
        }


def clock_of(groups: Sequence[RunGroup]) -> str | None:
    """The first of ``CLOCKS`` that every group's summaries have, above 0."""
    for name in CLOCKS:
        costs = [group.cost(name) for group in groups]
        if all(cost is not None and cost.mean > 0 for cost in costs):
            return name
    return None


def at_equal_time(comparison: Comparison) -> list[EqualTime]:
    """One row for each distilled student that some plain student can be held against."""
    students = [group for group in comparison.groups if group.title != "teacher"]
    clock = clock_of(students)
    plain = [group for group in students if not group.distils]
    if clock is None or not plain:
        return []
    rows = (_row(group, plain, clock) for group in students if group.distils)
    return [row for row in rows if row is not None]


def _row(group: RunGroup, plain: Sequence[RunGroup], clock: str) -> EqualTime | None:
    equal = [rival for rival in plain if _cost_the_same(group, rival, clock)]
    if not equal:
        return _estimate(group, plain, clock)
    rival = max(equal, key=_mAP)
    seconds = (_seconds(group, clock), _seconds(rival, clock))
    return EqualTime(
        group, rival, seconds, (_mAP(group), _mAP(rival)), group.gain_over(rival), False
    )


def _cost_the_same(one: RunGroup, two: RunGroup, clock: str) -> bool:
    ours, theirs = _seconds(one, clock), _seconds(two, clock)
    return abs(ours - theirs) <= TOLERANCE * max(ours, theirs)


def _estimate(group: RunGroup, plain: Sequence[RunGroup], clock: str) -> EqualTime | None:
    """Both curves at the time at which the shorter run ended."""
    found = []
    for rival in plain:
        seconds = min(_seconds(group, clock), _seconds(rival, clock))
        ours, theirs = (_curve_at(each, clock, seconds) for each in (group, rival))
        if ours is not None and theirs is not None:
            found.append(EqualTime(group, rival, (seconds, seconds), (ours, theirs), None, True))
    return max(found, key=lambda row: row.mAP[1], default=None)


def _curve_at(group: RunGroup, clock: str, seconds: float) -> float | None:
    """Validation mAP after so much time, between measurements on a straight line."""
    steps = group.cost("steps")
    curve = [(step, at.mean) for step, at in group.curve().items()]
    if steps is None or not curve or not steps.mean:
        return None
    step = seconds / _seconds(group, clock) * steps.mean
    before = [point for point in curve if point[0] <= step * (1 + 1e-9)]
    after = [point for point in curve if point[0] > step]
    if not before:
        return None
    (first, low), (last, high) = before[-1], (after or before[-1:])[0]
    return low if last == first else low + (high - low) * (step - first) / (last - first)


def _seconds(group: RunGroup, clock: str) -> float:
    cost = group.cost(clock)
    assert cost is not None
    return cost.mean


def _mAP(group: RunGroup) -> float:
    spread = group.metric("mAP")
    return 0.0 if spread is None else spread.mean
