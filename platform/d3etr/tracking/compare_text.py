"""A comparison as tables for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from d3etr.tracking.compare import Comparison, RunGroup, Spread

MANY_CLASSES = 20
LONGEST_VALUE = 40


def as_tables(comparison: Comparison, *, classes: bool = True, differences: bool = True) -> Group:
    """Results; and, on request, average precision per class and what sets the runs apart."""
    parts: list[RenderableType] = [results_table(comparison)]
    parts += [Text(caution, style="yellow") for caution in comparison.cautions()]
    if differences and comparison.differences():
        parts.append(differences_table(comparison))
    if classes and comparison.classes():
        parts.append(classes_table(comparison))
    return Group(*parts)


def results_table(comparison: Comparison) -> Table:
    """One row per group: quality in percent, cost, gain over the baseline in points."""
    table = Table(
        title=f"{comparison.split} split, %", title_justify="left", header_style="bold", box=None
    )
    table.add_column("run", no_wrap=True)
    for heading in RESULT_HEADINGS:
        table.add_column(heading, justify="right")
    for group in comparison.groups:
        table.add_row(label(group), *result_cells(comparison, group))
    return table


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


def result_cells(comparison: Comparison, group: RunGroup) -> list[str]:
    """Texts of a group's row, in the order of ``RESULT_HEADINGS``."""
    steps, speed = group.cost("steps"), group.cost("images_per_second")
    parameters, seconds = group.cost("parameters"), group.cost("training_seconds")
    return [
        percent(group.metric("mAP")),
        percent(comparison.gain(group), signed=True),
        percent(group.metric("AP50")),
        percent(group.metric("AP75")),
        "-" if parameters is None else millions(parameters.mean),
        "-" if speed is None else f"{speed.mean:.0f}",
        "-" if steps is None else f"{steps.mean:.0f}",
        "-" if seconds is None else duration(seconds.mean),
        ", ".join(str(seed) for seed in group.seeds),
    ]


def differences_table(comparison: Comparison) -> Table:
    """Settings that are not the same everywhere."""
    table = Table(title="\nwhat sets them apart", title_justify="left", box=None)
    table.add_column("setting", no_wrap=True, min_width=24)
    for group in comparison.groups:
        table.add_column(label(group), overflow="fold")
    for key, values in comparison.differences().items():
        table.add_row(key, *(shortened(value) for value in values))
    return table


def classes_table(comparison: Comparison) -> Table:
    """Average precision per class; of many classes those whose groups differ most."""
    rows = comparison.classes()
    table = Table(title="\nAP per class, %", title_justify="left", box=None)
    table.add_column("class")
    for group in comparison.groups:
        table.add_column(label(group), justify="right")
    widest = sorted(rows, key=lambda name: -_range(rows[name]))[:MANY_CLASSES]
    for name in (name for name in rows if name in set(widest)):
        table.add_row(name, *(percent(spread) for spread in rows[name]))
    if len(rows) > MANY_CLASSES:
        table.caption = f"the {MANY_CLASSES} of {len(rows)} classes that differ most"
    return table


def label(group: RunGroup) -> str:
    """Title and name, if the name says more."""
    squeezed = "".join(filter(str.isalnum, group.name.lower()))
    known = squeezed == "".join(filter(str.isalnum, group.title.lower()))
    return group.title if known else f"{group.title} ({group.name})"


def percent(spread: Spread | None, *, signed: bool = False) -> str:
    """``37.3 ± 0.5``: mean and deviation over seeds, in percent or points."""
    if spread is None:
        return "-"
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


def shortened(value: str) -> str:
    """A setting's value, its beginning cut off where it is long: the end of a path says more."""
    return value if len(value) <= LONGEST_VALUE else "..." + value[-(LONGEST_VALUE - 3) :]


def _range(spreads: list[Spread | None]) -> float:
    known = [spread.mean for spread in spreads if spread is not None]
    return max(known) - min(known) if known else 0.0
