"""The tables of a comparison, as text in rows; the terminal and the page show the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from d3etr.tracking.compare.comparison import Comparison, RunGroup, Spread
from d3etr.tracking.compare.equal_time import CLOCKS, EqualTime, at_equal_time, clock_of

MISSING = "-"
RESULT_HEADINGS = (
    "mAP",
    "gain",
    "AP50",
    "AP75",
    "parameters",
    "images/s",
    "steps",
    "training",
    "seeds",
)
EQUAL_TIME_HEADINGS = ("time", "mAP", "strongest plain", "time", "mAP", "gain")


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        title: what it shows, with units.
        headings: of the columns, the first that of the rows' headings.
        rows: each with its heading first.
        shares: fractions that the cells stand for, without the headings; empty for other tables.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    shares: tuple[tuple[float | None, ...], ...] = ()


def results_table(comparison: Comparison) -> Table:
    """One row per group: quality in percent, cost, gain over the baseline in points."""
    rows = [(group.label, *result_cells(comparison, group)) for group in comparison.groups]
    title = f"{comparison.split} split, %; after ± the deviation over seeds"
    return Table(title, ("run", *RESULT_HEADINGS), tuple(rows))


def result_cells(comparison: Comparison, group: RunGroup) -> list[str]:
    """Texts of a group's row, in the order of ``RESULT_HEADINGS``."""
    steps, speed = group.cost("steps"), group.cost("images_per_second")
    parameters, seconds = group.cost("parameters"), group.cost("training_seconds")
    return [
        percent(group.metric("mAP")),
        percent(comparison.gain(group), signed=True),
        percent(group.metric("AP50")),
        percent(group.metric("AP75")),
        MISSING if parameters is None else millions(parameters.mean),
        MISSING if speed is None else f"{speed.mean:.0f}",
        MISSING if steps is None else f"{steps.mean:.0f}",
        MISSING if seconds is None else duration(seconds.mean),
        ", ".join(str(seed) for seed in group.seeds),
    ]


def equal_time_table(comparison: Comparison) -> Table | None:
    """Each distilled student and the strongest plain one within the same time."""
    rows = at_equal_time(comparison)
    if not rows:
        return None
    clock = clock_of([group for group in comparison.groups if group.title != "teacher"])
    title = f"at equal time ({CLOCKS[clock or 'training_seconds']}), %"
    if any(row.estimated for row in rows):
        title += (
            "; from curves: validation mAP when the shorter run ended, the longer one unfinished"
        )
    return Table(title, ("run", *EQUAL_TIME_HEADINGS), tuple(_equal_time_row(row) for row in rows))


def _equal_time_row(row: EqualTime) -> tuple[str, ...]:
    ours, theirs = (f"{100 * value:.1f}" for value in row.mAP)
    gain = f"{100 * (row.mAP[0] - row.mAP[1]):+.1f}"
    if row.estimated:
        gain = f"{gain} (from curves)"
    elif row.gain is not None:
        gain = percent(row.gain, signed=True)
    first, second = (duration(seconds) for seconds in row.seconds)
    return (row.group.label, first, ours, row.rival.label, second, theirs, gain)


def differences_table(comparison: Comparison) -> Table | None:
    """Settings that are not the same everywhere."""
    rows = tuple((key, *values) for key, values in comparison.differences().items())
    title = "settings that are not the same everywhere"
    return Table(title, ("setting", *_labels(comparison)), rows) if rows else None


def classes_table(comparison: Comparison) -> Table | None:
    """Average precision of every class."""
    classes = comparison.classes()
    if not classes:
        return None
    return Table(
        f"AP per class on the {comparison.split} split, %",
        ("class", *_labels(comparison)),
        tuple((name, *map(percent, spreads)) for name, spreads in classes.items()),
        tuple(
            tuple(None if spread is None else spread.mean for spread in spreads)
            for spreads in classes.values()
        ),
    )


def curves_table(comparison: Comparison) -> Table:
    """Validation mAP at every step at which some group was measured."""
    curves = [group.curve() for group in comparison.groups]
    steps = sorted({step for curve in curves for step in curve})
    rows = [
        (
            f"{step:,}",
            *(f"{100 * curve[step].mean:.1f}" if step in curve else "" for curve in curves),
        )
        for step in steps
    ]
    return Table("validation mAP, %", ("step", *_labels(comparison)), tuple(rows))


def runs_table(comparison: Comparison) -> Table:
    """Where the numbers come from."""
    rows = [
        (group.label, str(run.seed), run.folder.name)
        for group in comparison.groups
        for run in group.runs
    ]
    return Table("where the numbers come from", ("run", "seed", "folder"), tuple(rows))


def percent(spread: Spread | None, *, signed: bool = False) -> str:
    """``37.3 ± 0.5``: mean and deviation over seeds, in percent or points."""
    if spread is None:
        return MISSING
    text = f"{100 * spread.mean:+.1f}" if signed else f"{100 * spread.mean:.1f}"
    return text if spread.deviation is None else f"{text} ± {100 * spread.deviation:.1f}"


def millions(count: float) -> str:
    """``0.48 M``, ``41.3 M``."""
    return f"{count / 1e6:.2f} M" if count < 1e7 else f"{count / 1e6:.1f} M"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _labels(comparison: Comparison) -> Sequence[str]:
    return [group.label for group in comparison.groups]
