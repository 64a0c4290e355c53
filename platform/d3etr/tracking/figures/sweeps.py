"""What a sweep found, as pictures: parallel coordinates, importance, cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from d3etr.tracking.figures.style import (
    INK,
    PLAIN,
    QUIET,
    STUDENT,
    TEXT_SIZE,
    empty_note,
    headline,
    new_figure,
    plain_axes,
)

LOGARITHMIC = 30.0
"""A range whose ends differ by this factor is drawn by its logarithm."""
COLOURS = "viridis"
SENSITIVE = 3
"""Digits of a number on an axis."""


@dataclass(frozen=True)
class Point:
    """A finished trial.

    Attributes:
        values: short key -> value; keys that were not set are missing.
        mAP: in [0, 1].
    """

    values: Mapping[str, Any]
    mAP: float


@dataclass(frozen=True)
class Scale:
    """Where the values of one key are on its axis, in [0, 1].

    Attributes:
        words: the values in order, where they are no numbers; else empty.
        low: end of the axis, its logarithm where ``logarithmic``.
        high: other end.
        logarithmic: whether distances are factors.
    """

    words: tuple[str, ...]
    low: float
    high: float
    logarithmic: bool

    def place(self, value: Any) -> float:
        """Height of a value."""
        if self.words:
            return self.words.index(str(value)) / max(1, len(self.words) - 1)
        number = math.log(value) if self.logarithmic else float(value)
        return 0.5 if self.high == self.low else (number - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Heights and their texts."""
        if self.words:
            return [(self.place(word), word) for word in self.words]
        numbers = np.linspace(self.low, self.high, 5 if self.high > self.low else 1)
        texts = [math.exp(n) if self.logarithmic else n for n in numbers]
        return [
            (0.5 if self.high == self.low else float(i / 4), f"{t:.{SENSITIVE}g}")
            for i, t in enumerate(texts)
        ]


def scale_of(values: Sequence[Any]) -> Scale:
    """The axis that shows all of ``values``."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return Scale(tuple(sorted({str(value) for value in values})), 0.0, 1.0, False)
    low, high = float(min(values)), float(max(values))
    if low > 0 and high / low >= LOGARITHMIC:
        return Scale((), math.log(low), math.log(high), True)
    return Scale((), low, high, False)


def draw_parallel_coordinates(points: Sequence[Point], keys: Sequence[str], title: str) -> Figure:
    """One vertical axis per key and one for mAP, one line per trial, coloured by mAP.

    Args:
        points: finished trials. Where a trial does not have a key, its line has a gap.
        keys: which, in order.
        title: of the sweep.
    """
    figure = new_figure(max(6.0, 2.2 * (len(keys) + 1)), 4.8)
    axes = figure.subplots()
    axes.set_axis_off()
    headline(figure, title, "each line is a trial; the last axis is its validation mAP (%)")
    if not points:
        empty_note(axes, "no trial has finished")
        return figure
    scores = [100 * p.mAP for p in points]
    columns: list[list[Any]] = [[p.values.get(key) for p in points] for key in keys]
    columns.append(list(scores))
    scales = [scale_of([v for v in column if v is not None]) for column in columns]
    colours = Normalize(min(scores), max(scores))
    for index in np.argsort([p.mAP for p in points], kind="stable"):
        heights = [
            np.nan if column[index] is None else scale.place(column[index])
            for column, scale in zip(columns, scales, strict=True)
        ]
        colour = colormaps[COLOURS](colours(scores[index]))
        axes.plot(range(len(columns)), heights, color=colour, linewidth=1.8, marker="o", alpha=0.8)
    for place, (name, scale) in enumerate(zip([*keys, "mAP"], scales, strict=True)):
        _draw_axis(axes, place, name, scale)
    axes.set_xlim(-0.3, len(columns) - 0.4)
    axes.set_ylim(-0.06, 1.1)
    figure.colorbar(ScalarMappable(colours, COLOURS), ax=axes, label="mAP (%)", fraction=0.03)
    return figure


def _draw_axis(axes: Axes, place: int, name: str, scale: Scale) -> None:
    axes.axvline(place, ymin=0.05, ymax=0.92, color=QUIET, linewidth=1, zorder=0)
    axes.text(place, 1.06, name, ha="center", fontsize=TEXT_SIZE + 1, color=INK)
    for height, text in scale.ticks():
        axes.text(place + 0.03, height, text, va="center", fontsize=TEXT_SIZE - 1, color=QUIET)


def draw_importance(importance: Mapping[str, float], explained: float, trials: int) -> Figure:
    """How much mAP depends on each key, most first.

    Args:
        importance: key -> share of what a random forest explains; they add up to 1.
        explained: share of the variance of mAP that the forest explains out of its bag.
        trials: that it was fitted to.
    """
    figure = new_figure(7.2, 1.6 + 0.45 * len(importance))
    axes = figure.subplots()
    names = sorted(importance, key=lambda name: importance[name])
    shares = [100 * importance[name] for name in names]
    bars = axes.barh(names, shares, color=STUDENT, height=0.6)
    axes.bar_label(bars, fmt="%.0f %%", fontsize=TEXT_SIZE, padding=3, color=INK)
    plain_axes(axes, "share of the importance (%)", "")
    axes.set_xlim(0, max(shares) * 1.15)
    below = f"permutation importance in a random forest over {trials} trials, which explains "
    headline(
        figure, "What mAP depends on", below + f"{100 * max(0.0, explained):.0f} % (out of bag)"
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
