"""One look for all figures: colours that colour-blind readers can distinguish, plain axes.

Figures are made object by object, never through pyplot: a driver thread may draw, and
pyplot's current figure is global.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from numpy.typing import NDArray

from d3etr.files import atomic_write
from d3etr.fonts import default_font, font_for
from d3etr.text import printable

Array = NDArray[np.floating[Any]]
Image = NDArray[np.uint8]

# Okabe and Ito's palette.
TRUTH = "#009E73"
TEACHER = "#0072B2"
STUDENT = "#D55E00"
PLAIN = "#7A7A7A"
DETECTORS = {"Teacher": TEACHER, "Student": STUDENT}
"""Colour of a detector by its name in a figure; others are ``PLAIN``."""
INK = "#222222"
QUIET = "#6B6B6B"
GRID = "#E3E3E3"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A")
Stroke: TypeAlias = Literal["-", "--", ":"]
STROKES: tuple[Stroke, ...] = ("-", "--", ":")

TITLE_SIZE = 13
PANEL_SIZE = 10.5
TEXT_SIZE = 9
PIXELS_PER_INCH = 120


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure; sizes in inches."""
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def headline(figure: Figure, title: str, below: str = "") -> None:
    """Title over the whole figure, left-aligned, with a quieter line below it."""
    text = f"{title}\n" if below else title
    figure.suptitle(text, x=0.01, ha="left", fontsize=TITLE_SIZE, weight="bold", color=INK)
    if below:
        # The title's second, empty line makes room for this one.
        height = float(figure.get_figheight())
        offset = 2.35 * TITLE_SIZE / 72 / height
        figure.text(
            0.01, 1 - offset, below, ha="left", va="center", fontsize=TEXT_SIZE, color=QUIET
        )


def panel_title(axes: Axes, text: str, colour: str = INK) -> None:
    """Title of one panel, left-aligned."""
    axes.set_title(text, loc="left", fontsize=PANEL_SIZE, color=colour, pad=5)


def plain_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """Two thin spines and a light grid below the data."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(QUIET)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=TEXT_SIZE, colors=QUIET, length=3)
    axes.set_xlabel(x_label, fontsize=TEXT_SIZE + 1, color=INK)
    axes.set_ylabel(y_label, fontsize=TEXT_SIZE + 1, color=INK)


def legend(axes: Axes, **places: Any) -> Legend:
    """A legend that lets lines below it shine through."""
    looks: dict[str, Any] = {"edgecolor": "none", "facecolor": "white", "framealpha": 0.75}
    made: Legend = axes.legend(fontsize=TEXT_SIZE, labelcolor=INK, **looks, **places)
    return made


def line_key(entries: Sequence[tuple[str, str, Stroke]]) -> list[Line2D]:
    """Legend handles from (label, colour, line style)."""
    return [
        Line2D([], [], color=colour, linestyle=stroke, linewidth=2, label=label)
        for label, colour, stroke in entries
    ]


def series_styles(count: int) -> list[tuple[str, Stroke]]:
    """(colour, line style) of ``count`` series; they repeat after 21."""
    pairs = [(colour, stroke) for stroke in STROKES for colour in SERIES]
    return list(islice(cycle(pairs), count))


def empty_note(axes: Axes, text: str) -> None:
    """A text in the middle of a panel: why there is nothing to see."""
    axes.text(
        0.5,
        0.5,
        text,
        ha="center",
        va="center",
        fontsize=TEXT_SIZE + 1,
        color=QUIET,
        transform=axes.transAxes,
    )


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG whole or not at all; its texts in fonts that have their letters."""
    for text in figure.findobj(Text):
        _make_readable(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=PIXELS_PER_INCH)
    return path


def as_svg(figure: Figure, name: str, summary: str, colours: Mapping[str, str]) -> Markup:
    """The figure as an element of a page, in the page's colours and font.

    Args:
        figure: with one colour of ``colours`` for everything that the page colours.
        name: CSS class; no two figures of a page have the same.
        summary: what it shows, for those who cannot see it.
        colours: ``#rrggbb`` -> what stands for it in the page.
    """
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        figure.savefig(drawn, format="svg", transparent=True)
    svg = drawn.getvalue()
    # What lies outside the axes is nothing here: no clip path, whose address names the page.
    svg = re.sub(r"<(metadata|style|clipPath)\b.*?</\1>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' clip-path="[^"]*"', "", svg)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r' id="[a-z.]+\d*_\d+"', "", body)  # of matplotlib's groups: nothing uses them
    page = {INK: "var(--ink)", QUIET: "var(--quiet)", GRID: "var(--line)"}
    for colour, instead in (page | dict(colours)).items():
        body = body.replace(colour.lower(), instead)
    width, height = (72 * side for side in figure.get_size_inches())
    return Markup(
        f'<svg class="chart {name}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(printable(summary))}">{body}'
    )


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
