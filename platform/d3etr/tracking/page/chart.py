"""Curves as inline SVG: they take the page's colours and need nothing that draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from d3etr.tracking.page.html import escape

Point = tuple[float, float]
LEFT, RIGHT, TOP, BOTTOM = 40, 14, 12, 40
NUMBERS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Curve:
    """One group's line.

    Attributes:
        label: names it to those who point at it or listen.
        points: (step, percent), by step.
        style: (index of the colour, dashes).
        spread: (step, lowest, highest) around the line; empty draws none.
        level: draw the last value as a level over all steps instead.
    """

    label: str
    points: Sequence[Point]
    style: tuple[int, str]
    spread: Sequence[tuple[float, float, float]] = ()
    level: bool = False


def draw_curves(curves: Sequence[Curve], width: int, height: int, kind: str, summary: str) -> str:
    """A chart of percent over optimiser steps.

    Args:
        curves: each has a point; at least one is no level.
        width: of the drawing; text is 12 of these units high.
        height: likewise.
        kind: CSS classes.
        summary: what it shows, for those who cannot see it.
    """
    last = max(step for curve in curves if not curve.level for step, _ in curve.points)
    highest = max(
        [value for curve in curves for _, value in curve.points]
        + [top for curve in curves for _, _, top in curve.spread]
    )
    x_ticks, y_ticks = ticks(last, 8 if width > 500 else 4), ticks(max(highest, 1.0), 5)
    frame = _Frame(width, height, max(last, 1.0), y_ticks[-1])
    parts = [_grid(frame, x_ticks, y_ticks), *(_curve(frame, curve) for curve in curves)]
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(summary)}">{"".join(parts)}</svg>'
    )


def ticks(highest: float, at_most: int) -> list[float]:
    """Round numbers from 0 to the first that is not below ``highest``."""
    rough = highest / at_most
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(number * power for number in NUMBERS if number * power >= rough * 0.9999)
    return [round(step * i, 10) for i in range(math.ceil(highest / step - 1e-9) + 1)]


@dataclass(frozen=True)
class _Frame:
    width: int
    height: int
    last: float
    highest: float

    def x(self, step: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * step / self.last

    def y(self, value: float) -> float:
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * value / self.highest

    def path(self, points: Sequence[Point]) -> str:
        return " ".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in points)


def _grid(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
    right, bottom = frame.width - RIGHT, frame.height - BOTTOM
    parts = []
    for value in y_ticks:
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step in (tick for tick in x_ticks if tick <= frame.last):
        x, y = frame.x(step), bottom + 16
        anchor = "middle" if x < right - 12 else "end"  # the last would be cut off
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{step:,.0f}</text>')
    middle = (LEFT + right) / 2
    parts.append(
        f'<text x="{middle}" y="{frame.height - 6}" text-anchor="middle">optimiser step</text>'
    )
    return f'<g aria-hidden="true">{"".join(parts)}</g>'


def _curve(frame: _Frame, curve: Curve) -> str:
    colour, dashes = curve.style
    if curve.level:
        return f'<g class="s{colour}">{_level(frame, curve)}</g>'
    parts = []
    if curve.spread:
        upper = [(step, top) for step, _, top in curve.spread]
        lower = [(step, low) for step, low, _ in reversed(curve.spread)]
        parts.append(f'<polygon class="spread" points="{frame.path([*upper, *lower])}"/>')
    line = f'stroke-dasharray="{dashes}" points="{frame.path(curve.points)}"'
    parts.append(f'<polyline class="curve" {line}/>')
    radius = 3.5 if len(curve.points) <= 40 else 1.2
    for step, value in curve.points:
        place = f'cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="{radius}"'
        says = f"{escape(curve.label)}, step {step:,.0f}: {value:.1f}"
        parts.append(f'<circle class="dot" {place}><title>{says}</title></circle>')
    return f'<g class="s{colour}">{"".join(parts)}</g>'


def _level(frame: _Frame, curve: Curve) -> str:
    value = curve.points[-1][1]
    y, says = frame.y(value), f"{escape(curve.label)}: {value:.1f}"
    line = f'x1="{LEFT}" y1="{y:.1f}" x2="{frame.width - RIGHT}" y2="{y:.1f}"'
    text = f'<text x="{frame.width - RIGHT}" y="{y - 6:.1f}" text-anchor="end">{value:.1f}</text>'
    return f'<line class="curve level" {line}><title>{says}</title></line>{text}'
