"""The tables of ``growth`` as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.side_by_side import Comparison


def draw(tables: Sequence[Comparison], path: Path) -> bool:
    """Time above, memory below, one column for each size that varies; both axes logarithmic.

    Args:
        tables: those of ``growth.compare``, time and memory of one size after the other.
        path: of the picture.

    Returns:
        False where matplotlib, which draws, is not installed.
    """
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    columns = len(tables) // 2
    figure = Figure(figsize=(3 * columns, 5), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False, sharey="row")
    for number, table in enumerate(tables):
        panel = axes[number % 2, number // 2]
        points = {int(size.replace(",", "")): v for size, v in table.values.items()}
        shown = {size: statistics.median(v) for size, v in points.items() if size}
        panel.loglog(*zip(*shown.items(), strict=True), marker="o", color=f"C{number % 2}")
        panel.set_xticks(list(shown), labels=[f"{size:,}" for size in shown])
        panel.minorticks_off()
        panel.set_title(table.title.partition(" by ")[2].partition(" (")[0], fontsize=9)
        panel.set_ylabel(table.unit if number < 2 else "")
        panel.annotate(_exponent(table), (0.05, 0.9), xycoords="axes fraction", fontsize=8)
    figure.savefig(path)
    return True


def _exponent(table: Comparison) -> str:
    return table.notes[0].partition(";")[0].rstrip(".")
