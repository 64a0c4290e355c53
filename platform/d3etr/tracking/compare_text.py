"""A comparison as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from d3etr.text import printable
from d3etr.tracking.compare import Comparison, RunGroup, Spread
from d3etr.tracking.equal_time import CLOCKS, EqualTime, at_equal_time, clock_of

if TYPE_CHECKING:
    from d3etr.tracking.pictures import Objects, Pictures

MANY_CLASSES = 20
LONGEST_VALUE = 40
BLOCKS = "▁▂▃▄▅▆▇█"
LONGEST_CURVE = 24


def as_tables(comparison: Comparison, pictures: Pictures | None = None) -> Group:
    """Results, curves, settings that differ, average precision per class, and detections.

    Args:
        comparison: of the runs.
        pictures: what the runs detect on some images; None leaves the part out.
    """
    parts: list[RenderableType] = [results_table(comparison)]
    if at_equal_time(comparison):
        parts.append(equal_time_table(comparison))
    parts += [Text(printable(caution), style="yellow") for caution in comparison.cautions()]
    if any(len(group.curve()) > 1 for group in comparison.groups):
        parts.append(curves_table(comparison))
    if comparison.differences():
        parts.append(differences_table(comparison))
    if comparison.classes():
        parts.append(classes_table(comparison))
    if pictures is not None:
        parts += [Text(printable(sentence), style="yellow") for sentence in pictures.missing]
        if pictures.pictures:
            parts.append(pictures_table(comparison, pictures))
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
        table.add_row(group.label, *result_cells(comparison, group))
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


EQUAL_TIME_HEADINGS = ("time", "mAP", "strongest plain", "time", "mAP", "gain")


def equal_time_cells(row: EqualTime) -> list[str]:
    """Texts of a row at equal time, in the order of ``EQUAL_TIME_HEADINGS``."""
    ours, theirs = (f"{100 * value:.1f}" for value in row.mAP)
    gain = f"{100 * (row.mAP[0] - row.mAP[1]):+.1f}"
    if row.estimated:
        gain = f"{gain} (from curves)"
    elif row.gain is not None:
        gain = percent(row.gain, signed=True)
    return [
        duration(row.seconds[0]),
        ours,
        row.rival.label,
        duration(row.seconds[1]),
        theirs,
        gain,
    ]


def equal_time_title(comparison: Comparison, rows: Sequence[EqualTime]) -> str:
    """Which time, and what a gain from curves is."""
    clock = clock_of([group for group in comparison.groups if group.title != "teacher"])
    title = f"at equal time ({CLOCKS[clock or 'training_seconds']}), %"
    if any(row.estimated for row in rows):
        title += (
            "; from curves: validation mAP when the shorter run ended, the longer one unfinished"
        )
    return title


def equal_time_table(comparison: Comparison) -> Table:
    """Each distilled student beside the strongest plain one within the same time."""
    rows = at_equal_time(comparison)
    table = Table(title=f"\n{equal_time_title(comparison, rows)}", title_justify="left", box=None)
    table.add_column("run", no_wrap=True)
    for heading in EQUAL_TIME_HEADINGS:
        table.add_column(heading, justify="left" if heading.startswith("strong") else "right")
    for row in rows:
        table.add_row(row.group.label, *equal_time_cells(row))
    return table


def curves_table(comparison: Comparison) -> Table:
    """Validation mAP during training as a row of blocks, with its first and last value."""
    table = Table(title="\nvalidation mAP during training, %", title_justify="left", box=None)
    for heading in ("run", "first", "", "last", "measured"):
        table.add_column(heading, justify="right" if heading in ("first", "measured") else "left")
    curves = [(group, group.curve()) for group in comparison.groups]
    highest = max((at.mean for _, curve in curves for at in curve.values()), default=0.0)
    for group, curve in curves:
        values = [at.mean for at in curve.values()]
        if values:
            ends = [f"{100 * value:.1f}" for value in (values[0], values[-1])]
            times = f"{len(values)} times" if len(values) > 1 else "once"
            table.add_row(group.label, ends[0], blocks(values, highest), ends[1], times)
    return table


def blocks(values: Sequence[float], highest: float) -> str:
    """Values as a row of blocks; of many, evenly spaced ones and the last.

    Args:
        values: at least 0.
        highest: that the highest block stands for.
    """
    stride = -(-len(values) // LONGEST_CURVE)
    chosen = list(values[::-1][::stride][::-1])
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round(top * value / highest) if highest > 0 else 0] for value in chosen)


def pictures_table(comparison: Comparison, pictures: Pictures) -> Table:
    """What each group detects on the same images: class and score; a wrong one in brackets."""
    table = Table(
        title=f"\nthe same {pictures.split} images (wrong detections in brackets)",
        title_justify="left",
        box=None,
    )
    table.add_column("image", no_wrap=True)
    table.add_column("annotated")
    for group in comparison.groups:
        table.add_column(group.label)
    for picture in pictures.pictures:
        found = ["no weights" if each is None else _detected(each) for each in picture.detections]
        names = ", ".join(picture.truth.names) or "nothing"
        table.add_row(*(Text(printable(text)) for text in (picture.title, names, *found)))
    return table


def _detected(objects: Objects) -> str:
    scores, right = objects.scores or (), objects.right or ()
    parts = [
        f"{name} {score:.2f}" if is_right else f"({name} {score:.2f})"
        for name, score, is_right in zip(objects.names, scores, right, strict=True)
    ]
    return ", ".join(parts) or "nothing"


def differences_table(comparison: Comparison) -> Table:
    """Settings that are not the same everywhere."""
    table = Table(title="\nwhat sets them apart", title_justify="left", box=None)
    table.add_column("setting", no_wrap=True, min_width=24)
    for group in comparison.groups:
        table.add_column(group.label, overflow="fold")
    for key, values in comparison.differences().items():
        table.add_row(key, *(shortened(value) for value in values))
    return table


def classes_table(comparison: Comparison) -> Table:
    """Average precision per class; of many classes those whose groups differ most."""
    rows = comparison.classes()
    table = Table(title="\nAP per class, %", title_justify="left", box=None)
    table.add_column("class")
    for group in comparison.groups:
        table.add_column(group.label, justify="right")
    widest = sorted(rows, key=lambda name: -_range(rows[name]))[:MANY_CLASSES]
    for name in (name for name in rows if name in set(widest)):
        table.add_row(Text(printable(name)), *(percent(spread) for spread in rows[name]))
    if len(rows) > MANY_CLASSES:
        table.caption = f"the {MANY_CLASSES} of {len(rows)} classes that differ most"
    return table


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
