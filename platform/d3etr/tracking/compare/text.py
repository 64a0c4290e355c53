"""A comparison as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from d3etr.text import printable
from d3etr.tracking.compare.comparison import Comparison
from d3etr.tracking.compare.tables import (
    Table,
    classes_table,
    differences_table,
    equal_time_table,
    results_table,
)

if TYPE_CHECKING:
    from d3etr.tracking.compare.pictures import Pictures
    from d3etr.tracking.figures.images import Objects

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
    parts: list[RenderableType] = [_rich(results_table(comparison))]
    if (at_equal_time := equal_time_table(comparison)) is not None:
        parts.append(_rich(at_equal_time))
    parts += [_caution(sentence) for sentence in comparison.cautions()]
    if any(len(group.curve()) > 1 for group in comparison.groups):
        parts.append(_rich(_curves(comparison), justify="left"))
    if (differences := differences_table(comparison)) is not None:
        rows = tuple((key, *map(_shortened, values)) for key, *values in differences.rows)
        parts.append(_rich(replace(differences, rows=rows), justify="left"))
    if (classes := classes_table(comparison)) is not None:
        parts.append(_rich(_most_different(classes)))
    if pictures is not None:
        parts += [_caution(sentence) for sentence in pictures.missing]
        if pictures.pictures:
            parts.append(_rich(_detections(comparison, pictures), justify="left"))
    return Group(*parts)


def _rich(table: Table, justify: Literal["left", "right"] = "right") -> RichTable:
    shown = RichTable(title=f"\n{table.title}", title_justify="left", header_style="bold", box=None)
    for place, heading in enumerate(table.headings):
        if place == 0:
            shown.add_column(printable(heading), no_wrap=True)
        else:
            shown.add_column(printable(heading), justify=justify, overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    return shown


def _caution(sentence: str) -> Text:
    return Text(printable(sentence), style="yellow")


def _curves(comparison: Comparison) -> Table:
    """Validation mAP during training as a row of blocks, with its first and last value."""
    curves = [(group.label, group.curve()) for group in comparison.groups]
    highest = max((at.mean for _, curve in curves for at in curve.values()), default=0.0)
    rows = []
    for label, curve in curves:
        values = [at.mean for at in curve.values()]
        if values:
            first, last = (f"{100 * value:.1f}" for value in (values[0], values[-1]))
            times = f"{len(values)} times" if len(values) > 1 else "once"
            rows.append((label, first, blocks(values, highest), last, times))
    headings = ("run", "first", "", "last", "measured")
    return Table("validation mAP during training, %", headings, tuple(rows))


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


def _detections(comparison: Comparison, pictures: Pictures) -> Table:
    """What each group detects on the same images: class and score; a wrong one in brackets."""
    rows = [
        (
            picture.title,
            ", ".join(picture.truth.names) or "nothing",
            *(
                "no weights" if found is None else _detected(found)
                for found in picture.detections.values()
            ),
        )
        for picture in pictures.pictures
    ]
    title = f"the same {pictures.split} images (wrong detections in brackets)"
    labels = [group.label for group in comparison.groups]
    return Table(title, ("image", "annotated", *labels), tuple(rows))


def _detected(objects: Objects) -> str:
    right = objects.right or [True] * len(objects.names)
    pairs = zip(objects.labels, right, strict=True)
    return ", ".join(text if is_right else f"({text})" for text, is_right in pairs) or "nothing"


def _most_different(table: Table) -> Table:
    """Of many classes those whose groups differ most, in the table's order."""
    if len(table.rows) <= MANY_CLASSES:
        return table
    ranges = [_range(shares) for shares in table.shares]
    widest = sorted(range(len(ranges)), key=lambda row: -ranges[row])[:MANY_CLASSES]
    title = f"{table.title}: the {MANY_CLASSES} of {len(ranges)} classes that differ most"
    return replace(table, title=title, rows=tuple(table.rows[row] for row in sorted(widest)))


def _shortened(value: str) -> str:
    """A setting's value, its beginning cut off where it is long: the end of a path says more."""
    return value if len(value) <= LONGEST_VALUE else "..." + value[-(LONGEST_VALUE - 3) :]


def _range(shares: Sequence[float | None]) -> float:
    known = [share for share in shares if share is not None]
    return max(known) - min(known) if known else 0.0
