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
    TEXT_SIZE,
    Array,
    Stroke,
    empty_note,
    headline,
    legend,
    line_key,
    new_figure,
    panel_title,
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
    figure = new_figure(12, 4.8)
    left, right = figure.subplots(1, 2)
    key: list[tuple[str, str, Stroke]] = []
    for label, precision in precisions.items():
        for row, iou, stroke in IOU_ROWS:
            curve = _mean_curve(precision[row])
            _line(left, curve, DETECTORS.get(label, PLAIN), stroke, width=2.2)
            text = f"{label}, IoU {iou:g}: AP {_percent(_mean(precision[row]))}"
            key.append((text, DETECTORS.get(label, PLAIN), stroke))
    legend(left, handles=line_key(key), loc="lower left")
    panel_title(left, "All classes")
    own = list(precisions)[-1]
    _draw_classes(right, precisions[own][0], names, own)
    for axes in (left, right):
        plain_axes(axes, "recall", "precision")
        axes.set_xlim(0, 1.005)
        axes.set_ylim(0, 1.02)
    headline(figure, "Precision and recall", subject)
    return figure


def draw_training(
    series: Sequence[Series],
    title: str = "Validation mAP during training",
    *,
    inches: tuple[float, float] = (7.6, 4.4),
    key: bool = True,
) -> Figure:
    """Validation mAP over optimiser steps.

    Args:
        series: one line per run.
        title: over the figure; empty where the page around it has one.
        inches: width and height.
        key: draw a legend.
    """
    figure, axes = _draw_series(series, "mAP (%)", inches, "not measured yet")
    # A detector that has learnt nothing yet must not look like a mountain range.
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.set_xlim(left=0)
    if key:
        legend(axes, loc="best")
    if title:
        headline(figure, title)
    return figure


def draw_stability(series: Sequence[Series]) -> Figure:
    """Share of adaptive pairs that stayed as they were an evaluation before."""
    nothing = "no adaptive matching, or fewer than two measurements"
    figure, axes = _draw_series(series, "unchanged pairs (%)", (7.6, 3.8), nothing)
    axes.set_ylim(0, 102)
    if len(series) > 1:
        legend(axes, loc="lower right")
    headline(
        figure,
        "Matching stability",
        "teacher-student pairs of Adaptive Matching that were the same a measurement before",
    )
    return figure


def draw_cases(cases: Mapping[str, Sequence[float]], baseline: str | None) -> Figure:
    """MAP of named configurations: mean as a bar, each seed as a dot.

    Args:
        cases: name -> mAP in [0, 1] by seed.
        baseline: drawn in grey.
    """
    figure = new_figure(8.4, 1.4 + 0.42 * len(cases))
    axes = figure.subplots()
    names = list(cases)[::-1]
    for row, name in enumerate(names):
        values = 100 * np.asarray(cases[name])
        colour = PLAIN if name == baseline else STUDENT
        axes.barh(row, values.mean(), color=colour, alpha=0.55, height=0.62)
        axes.plot(values, np.full(len(values), row), "o", color=colour, markersize=4)
        axes.text(values.max() + 0.5, row, f"{values.mean():.1f}", va="center", fontsize=TEXT_SIZE)
    axes.set_yticks(range(len(names)), names)
    plain_axes(axes, "mAP (%)", "")
    axes.set_xlim(0, 1.12 * max(100 * max(values) for values in cases.values()))
    headline(figure, "Configurations", "bar: mean over seeds; dot: one seed")
    return figure


def _draw_series(
    series: Sequence[Series], label: str, inches: tuple[float, float], nothing: str
) -> tuple[Figure, Axes]:
    """Fractions as percent; single measurements are marked while they are few."""
    figure = new_figure(*inches)
    axes = figure.subplots()
    for line in series:
        percent = 100 * np.asarray(line.values, dtype=float)
        if line.level:
            text = f"{line.label}: {percent[-1]:.1f}"
            axes.axhline(percent[-1], color=line.colour, linestyle="--", linewidth=1.5, label=text)
            continue
        if any(line.deviations):
            half = 100 * np.asarray(line.deviations, dtype=float)
            low, high = percent - half, percent + half
            axes.fill_between(line.steps, low, high, color=line.colour, alpha=0.16, linewidth=0)
        axes.plot(
            line.steps,
            percent,
            color=line.colour,
            linestyle=line.stroke,
            linewidth=2.2,
            marker="o" if len(line.steps) < 30 else "",
            markersize=4,
            label=line.label,
        )
    if not any(len(line.steps) for line in series):
        empty_note(axes, nothing)
    plain_axes(axes, "optimiser step", label)
    return figure, axes


def _draw_classes(axes: Axes, precision: Array, names: Sequence[str], label: str) -> None:
    """Up to ten classes by name; of more, the best and worst by name and the rest in grey."""
    averages = [_mean(precision[:, k]) for k in range(len(names))]
    present = [k for k in range(len(names)) if averages[k] is not None]
    present.sort(key=lambda k: -(averages[k] or 0.0))
    named = present if len(present) <= MANY_CLASSES else present[:4] + present[-4:]
    for k in set(present) - set(named):
        _line(axes, precision[:, k], PLAIN, "-", width=0.7, alpha=0.5)
    for k, (colour, stroke) in zip(named, series_styles(len(named)), strict=True):
        text = f"{_short(names[k])}: AP {_percent(averages[k])}"
        _line(axes, precision[:, k], colour, stroke, label=text)
    panel_title(axes, f"{label} per class at IoU 0.5")
    if not present:
        empty_note(axes, "no objects to detect")
    else:
        legend(axes, loc="upper left", bbox_to_anchor=(1.0, 1.02))


def _line(
    axes: Axes,
    curve: Array,
    colour: str,
    stroke: Stroke,
    width: float = 1.6,
    alpha: float = 1.0,
    label: str | None = None,
) -> None:
    valid = curve > -1
    axes.plot(
        RECALLS[valid],
        curve[valid],
        color=colour,
        linestyle=stroke,
        linewidth=width,
        alpha=alpha,
        label=label,
    )


def _mean_curve(precision: Array) -> Array:
    """[101]: mean over classes that have objects, -1 if none has."""
    present = precision[:, (precision > -1).any(0)]
    return present.mean(1) if present.size else np.full(len(precision), -1.0)


def _mean(precision: Array) -> float | None:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _short(name: str, longest: int = 18) -> str:
    # Matplotlib leaves labels that begin with an underscore out of legends.
    name = f" {name}" if name.startswith("_") else name
    return name if len(name) <= longest else name[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"
