"""The tables of a comparison, as text in rows; the terminal and the page show the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from d3etr.text import printable
from d3etr.tracking.compare.comparison import CLOCKS, Comparison, shortened
from d3etr.tracking.compare.groups import RunGroup, Spread
from d3etr.tracking.compare.latency import RUN_AS

MISSING = "-"
MANY_CLASSES = 20
LONGEST_VALUE = 40


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        title: what it shows, with units.
        headings: of the columns, the first that of the rows' headings.
        rows: each with its heading first.
        justify: of the cells.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    justify: Literal["left", "right"] = "right"

    def as_rich(self) -> RichTable:
        """For a terminal."""
        # As Text: names may have brackets, which rich takes for markup.
        title = Text(f"\n{printable(self.title)}", style="table.title")
        shown = RichTable(title=title, title_justify="left", box=None)
        first, *others = (Text(printable(heading)) for heading in self.headings)
        shown.add_column(first, no_wrap=True)
        for heading in others:
            shown.add_column(heading, justify=self.justify, overflow="fold")
        for row in self.rows:
            shown.add_row(*(Text(printable(cell)) for cell in row))
        return shown


def as_tables(comparison: Comparison) -> Group:
    """Everything for a terminal: results, settings that differ, each class, and cautions."""
    tables = [
        results_table(comparison),
        equal_time_table(comparison),
        differences_table(comparison, LONGEST_VALUE),
        classes_table(comparison, MANY_CLASSES),
    ]
    parts: list[RenderableType] = [table.as_rich() for table in tables if table.rows]
    cautions = (Text(printable(sentence), style="yellow") for sentence in comparison.cautions())
    return Group(*parts, *cautions)


def results_table(comparison: Comparison, headings: Sequence[str] = ()) -> Table:
    """One row per group: quality in percent, cost, gain over the baseline in points.

    Args:
        comparison: of the runs.
        headings: the columns; all of them by default.
    """
    rows = [_result_cells(comparison, group) for group in comparison.groups]
    chosen = tuple(headings) or tuple(rows[0])
    title = f"{comparison.split} split, %; after ± the deviation over seeds"
    if (measured := comparison.latencies) is not None:
        title += f"; p50 ms: {measured.batch} at once, {RUN_AS}, {measured.machine}"
    cells = tuple(
        (group.label, *(row[heading] for heading in chosen))
        for group, row in zip(comparison.groups, rows, strict=True)
    )
    return Table(title, ("run", *chosen), cells)


def _result_cells(comparison: Comparison, group: RunGroup) -> dict[str, str]:
    steps, latency = group.cost("steps"), comparison.latency(group)
    parameters, seconds = group.cost("parameters"), group.cost("training_seconds")
    cells = {
        "mAP": percent(group.metric("mAP")),
        "gain": percent(comparison.gain(group), signed=True),
        "AP50": percent(group.metric("AP50")),
        "AP75": percent(group.metric("AP75")),
        "parameters": MISSING if parameters is None else millions(parameters.mean),
        "p50 ms": MISSING if latency is None else f"{latency:,.1f}",
        "steps": MISSING if steps is None else f"{steps.mean:.0f}",
        "training": MISSING if seconds is None else duration(seconds.mean),
        "seeds": ", ".join(map(str, group.seeds)),
    }
    if comparison.latencies is None:
        del cells["p50 ms"]
    return cells


def equal_time_table(comparison: Comparison) -> Table:
    """Each distilled student and the strongest plain one within the same time."""
    found = comparison.equal_time()
    rows = [
        (
            row.group.label,
            duration(row.seconds[0]),
            f"{100 * row.mAP[0]:.1f}",
            row.rival.label,
            duration(row.seconds[1]),
            f"{100 * row.mAP[1]:.1f}",
            percent(row.gain, signed=True) + (" (from curves)" if row.estimated else ""),
        )
        for row in found
    ]
    title = f"at equal time ({CLOCKS.get(comparison.clock() or '', '')}), %"
    if any(row.estimated for row in found):
        title += (
            "; from curves: validation mAP when the shorter run ended, the longer one unfinished"
        )
    headings = ("run", "time", "mAP", "strongest plain", "time", "mAP", "gain")
    return Table(title, headings, tuple(rows))


def differences_table(comparison: Comparison, longest: int = 1000) -> Table:
    """Settings that are not the same everywhere; values of at most ``longest`` characters."""
    rows = tuple(
        (key, *(shortened(value, longest) for value in values))
        for key, values in comparison.differences().items()
    )
    headings = ("setting", *_labels(comparison))
    return Table("settings that are not the same everywhere", headings, rows, "left")


def classes_table(comparison: Comparison, most: int | None = None) -> Table:
    """Average precision of every class, or of the ``most`` whose groups differ most."""
    classes = comparison.classes()
    title = f"AP per class on the {comparison.split} split, %"
    if most is not None and len(classes) > most:
        title += f": the {most} of {len(classes)} classes that differ most"
        widest = sorted(classes, key=lambda name: -_range(classes[name]))[:most]
        classes = {name: spreads for name, spreads in classes.items() if name in widest}
    rows = tuple((name, *map(percent, spreads)) for name, spreads in classes.items())
    return Table(title, ("class", *_labels(comparison)), rows)


def curves_table(comparison: Comparison) -> Table:
    """Validation mAP at every step at which some group was measured."""
    curves = [group.curve() for group in comparison.groups]
    rows = tuple(
        (f"{step:,}", *(percent(curve[step]) if step in curve else "" for curve in curves))
        for step in sorted({step for curve in curves for step in curve})
    )
    return Table("validation mAP, %", ("step", *_labels(comparison)), rows)


def runs_table(comparison: Comparison) -> Table:
    """Where the numbers come from."""
    rows = tuple(
        (group.label, str(seed), run.folder.name)
        for group in comparison.groups
        for seed, run in zip(group.seeds, group.runs, strict=True)
    )
    return Table("where the numbers come from", ("run", "seed", "folder"), rows)


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


def _range(spreads: Sequence[Spread | None]) -> float:
    known = [spread.mean for spread in spreads if spread is not None]
    return max(known) - min(known) if known else 0.0


def _labels(comparison: Comparison) -> list[str]:
    return [group.label for group in comparison.groups]
