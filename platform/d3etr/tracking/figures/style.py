"""One look for all figures: colours that colour-blind readers can distinguish, plain axes.

Figures are made object by object, never through pyplot: a driver thread may draw, and
pyplot's current figure is global.
"""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.text import Text
from numpy.typing import NDArray

from d3etr.files import atomic_write
from d3etr.fonts import default_font, font_for

Array = NDArray[np.floating[Any]]
Image = NDArray[np.uint8]

# Okabe and Ito's palette.
TRUTH = "#009E73"
TEACHER = "#0072B2"
STUDENT = "#D55E00"
PLAIN = "#7A7A7A"
DETECTORS = {"Teacher": TEACHER, "Student": STUDENT}
"""Colour of a detector by its name in a figure; others are ``PLAIN``."""
QUIET = "#6B6B6B"
SERIES = (TEACHER, STUDENT, TRUTH, "#CC79A7", "#E69F00", "#56B4E9", PLAIN)
Stroke: TypeAlias = Literal["-", "--", ":"]
STROKES: tuple[Stroke, ...] = ("-", "--", ":")
TEXT_SIZE = 9
PIXELS_PER_INCH = 120


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty white figure with a left-aligned title; sizes in inches."""
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def plain_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """Two spines and a light grid below the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=TEXT_SIZE)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def legend(axes: Axes, **places: Any) -> None:
    """A small legend without a frame."""
    axes.legend(fontsize=TEXT_SIZE, edgecolor="none", **places)


def series_styles(count: int) -> list[tuple[str, Stroke]]:
    """(colour, line style) of ``count`` series; they repeat after 21."""
    return list(islice(cycle([(colour, stroke) for stroke in STROKES for colour in SERIES]), count))


def empty_note(axes: Axes, text: str) -> None:
    """A text in the middle of a panel: why there is nothing to see."""
    axes.text(0.5, 0.5, text, ha="center", va="center", color=QUIET, transform=axes.transAxes)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG or SVG whole or not at all; its texts in fonts that have their letters."""
    for text in figure.findobj(Text):
        _make_readable(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=PIXELS_PER_INCH)
    return path


def _make_readable(text: Text) -> None:
    text.set_parse_math(False)  # a class may be called "$5"
    if text.get_text().isascii():
        return
    font = font_for(text.get_text())
    if font is None:
        text.set_text("".join(char if font_for(char) else "?" for char in text.get_text()))
    elif font != default_font():
        fontManager.addfont(font)
        text.set_fontfamily([*text.get_fontfamily(), FontProperties(fname=font).get_name()])
