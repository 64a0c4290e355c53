"""Accuracy over time, a band for each contender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from d3etr.tracking.figures.style import legend, new_figure, plain_axes, series_styles

MINUTES_BELOW = 0.75
"""Hours; shorter runs are shown in minutes."""


@dataclass(frozen=True)
class Band:
    """A mean and an interval around it, over time.

    Attributes:
        label: in the legend.
        hours: of training, at each point.
        means: fractions in [0, 1].
        lows: lower ends of the interval.
        highs: upper ends.
    """

    label: str
    hours: Sequence[float]
    means: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


def draw_bands(bands: Sequence[Band], title: str, time: str, level: float | None = None) -> Figure:
    """Validation mAP over hours.

    Args:
        bands: one a contender.
        title: of the figure.
        time: what is counted, such as ``GPU time``.
        level: the teacher's mAP, a line; None draws none.
    """
    figure = new_figure(8, 4.6, title)
    axes = figure.add_subplot()
    longest = max((max(band.hours, default=0.0) for band in bands), default=0.0)
    factor, unit = (60, "minutes") if longest < MINUTES_BELOW else (1, "hours")
    for band, (colour, stroke) in zip(bands, series_styles(len(bands)), strict=True):
        at = [factor * each for each in band.hours]
        low, high = ([100 * min(1, max(0, v)) for v in e] for e in (band.lows, band.highs))
        axes.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(
            at,
            [100 * mean for mean in band.means],
            color=colour,
            linestyle=stroke,
            marker="o",
            markersize=4,
            linewidth=2.2,
            label=band.label,
        )
    if level is not None:
        axes.axhline(100 * level, color="black", linestyle=":", linewidth=1.2, label="teacher")
    plain_axes(axes, f"{unit} of {time}", "validation mAP (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    legend(axes)
    return figure
