"""What a sweep found, as pictures: importance and cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from d3etr.tracking.figures.style import (
    INK,
    PLAIN,
    STUDENT,
    TEXT_SIZE,
    headline,
    new_figure,
    plain_axes,
)


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
