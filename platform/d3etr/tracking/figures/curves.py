"""Precision over recall, and how a run went over its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d3etr.tracking.figures.style import (
    DETECTORS,
    PLAIN,
    STUDENT,
    Array,
    Stroke,
    empty_note,
    legend,
    new_figure,
    plain_axes,
    series_styles,
)

RECALLS = np.linspace(0, 1, 101)
IOU_ROWS: tuple[tuple[int, float, Stroke], ...] = ((0, 0.5, "-"), (5, 0.75, "--"))
"""Row in COCO's ten thresholds, its IoU, the line style."""
MANY_CLASSES = 10


@dataclass(frozen=True)
class Series:
    """One line of a chart: a value at each of some optimiser steps.

    Attributes:
        label: in the legend.
        steps: optimiser steps.
        values: fractions in [0, 1], at each step.
        colour: ``#rrggbb``.
        stroke: line style.
        deviations: of each value, drawn as a band; empty draws none.
        level: draw the last value as a dashed level over all steps instead.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: str = STUDENT
    stroke: Stroke = "-"
    deviations: Sequence[float] = ()
    level: bool = False


def draw_precision_recall(
    precisions: Mapping[str, Array], names: Sequence[str], subject: str
) -> Figure:
    """Left: all classes at IoU 0.5 and 0.75 per detector. Right: one detector per class at 0.5.

    Args:
        precisions: "Teacher", "Student" -> [10 IoU thresholds, 101 recalls, C], -1
            for classes without objects. The last one is also drawn per class.
        names: C class names.
        subject: what was measured, as in "validation images".
    """
    figure = new_figure(12, 4.8, f"Precision and recall on {subject}")
    left, right = figure.subplots(1, 2)
    for detector, precision in precisions.items():
        present = (precision > -1).all((0, 1))
        if not present.any():
            empty_note(left, "no objects to detect")
            continue
        for row, iou, stroke in IOU_ROWS:
            curve = precision[row][:, present].mean(1)
            label = f"{detector}, IoU {iou:g}: AP {100 * curve.mean():.1f}"
            colour = DETECTORS.get(detector, PLAIN)
            left.plot(RECALLS, curve, color=colour, linestyle=stroke, linewidth=2.2, label=label)
    left.set_title("All classes", loc="left", fontsize=10)
    if left.lines:
        legend(left, loc="lower left")
    own, precision = list(precisions.items())[-1]
    right.set_title(f"{own} per class at IoU 0.5", loc="left", fontsize=10)
    _draw_classes(right, precision[0], names)
    for axes in (left, right):
        plain_axes(axes, "recall", "precision")
        axes.set(xlim=(0, 1.005), ylim=(0, 1.02))
    return figure


def _draw_classes(axes: Axes, precision: Array, names: Sequence[str]) -> None:
    """The best classes by name and the rest in grey."""
    present = [k for k in range(len(names)) if (precision[:, k] > -1).all()]
    if not present:
        empty_note(axes, "no objects to detect")
        return
    present.sort(key=lambda k: -precision[:, k].mean())
    styles = series_styles(MANY_CLASSES)
    for place, k in enumerate(present):
        colour, stroke = styles[place] if place < MANY_CLASSES else (PLAIN, "-")
        name = names[k] if len(names[k]) <= 18 else f"{names[k][:17]}\N{HORIZONTAL ELLIPSIS}"
        # Matplotlib leaves labels that begin with an underscore out of legends.
        text = f" {name}: AP {100 * precision[:, k].mean():.1f}" if place < MANY_CLASSES else None
        axes.plot(RECALLS, precision[:, k], color=colour, linestyle=stroke, label=text)
    legend(axes, loc="upper left", bbox_to_anchor=(1.0, 1.02))


def draw_series(
    series: Sequence[Series], label: str, title: str = "", *, nothing: str = "not measured yet"
) -> Figure:
    """Fractions over optimiser steps, in percent; few measurements are marked.

    Args:
        series: one line per run.
        label: of the vertical axis.
        title: over the figure; empty where the page around it has one.
        nothing: what stands there when no series has a value.
    """
    figure = new_figure(7.6, 4.2, title)
    axes = figure.subplots()
    for line in series:
        percent = 100 * np.asarray(line.values, dtype=float)
        if line.level:
            text = f"{line.label}: {percent[-1]:.1f}"
            axes.axhline(percent[-1], color=line.colour, linestyle="--", label=text)
            continue
        if any(line.deviations):
            half = 100 * np.asarray(line.deviations, dtype=float)
            band = (percent - half, percent + half)
            axes.fill_between(line.steps, *band, color=line.colour, alpha=0.16, linewidth=0)
        marker = "o" if len(line.steps) < 30 else ""
        [drawn] = axes.plot(line.steps, percent, marker=marker, markersize=4, label=line.label)
        drawn.set(color=line.colour, linestyle=line.stroke, linewidth=2.2)
    plain_axes(axes, "optimiser step", label)
    if any(len(line.steps) for line in series):
        # A detector that has learnt nothing yet must not look like a mountain range.
        axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
        axes.set_xlim(left=0)
        legend(axes)
    else:
        empty_note(axes, nothing)
    return figure
