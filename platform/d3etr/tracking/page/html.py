"""Tables and texts of the page; everything that comes from runs is escaped here."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from d3etr.text import printable

LONGEST_WORD = 12


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: as a person reads it.
        kind: CSS classes.
        bar: length of the bar behind the text, in percent; None draws none.
    """

    text: str
    kind: str = ""
    bar: float | None = None

    def html(self) -> str:
        """The cell's element."""
        kind = f' class="{self.kind}"' if self.kind else ""
        bar = "" if self.bar is None else f' style="--v:{min(100.0, max(0.0, self.bar)):.1f}"'
        return f"<td{kind}{bar}>{breakable(self.text)}</td>"


@dataclass(frozen=True)
class Head:
    """A heading of a row or column.

    Attributes:
        text: as a person reads it.
        swatch: HTML before it.
    """

    text: str
    swatch: str = ""

    def html(self, scope: str) -> str:
        """The heading's element.

        Args:
            scope: "row" or "col".
        """
        return f'<th scope="{scope}">{self.swatch}{breakable(self.text)}</th>'


def escape(text: str) -> str:
    """``text`` as HTML shows it: no markup, nothing that turns the reading direction."""
    return html.escape(printable(text))


def table(
    caption: str, columns: Sequence[Head], rows: Sequence[tuple[Head, list[Cell]]], kind: str = ""
) -> str:
    """A table that scrolls sideways where it is wider than the page.

    Args:
        caption: says what it shows.
        columns: headings, that of the rows' headings first.
        rows: heading and cells.
        kind: CSS classes.
    """
    head = "".join(column.html("col") for column in columns)
    body = "".join(
        f"<tr>{name.html('row')}{''.join(cell.html() for cell in cells)}</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table class="{kind}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def section(title: str, *parts: str) -> str:
    """A part of the page under a heading."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def note(text: str) -> str:
    """A sentence that must not be overlooked."""
    return f'<p class="note" role="note">{escape(text)}</p>'


def breakable(text: str) -> str:
    """Escaped; long dotted keys and paths may break where a person would break them."""
    if len(text) <= LONGEST_WORD or " " in text:
        return escape(text)
    return re.sub(r"(?<=\w)([._/])(?=\w)", r"\1<wbr>", escape(text))


def swatch(style: tuple[int, str]) -> str:
    """A piece of a group's line, for legends.

    Args:
        style: (index of the colour, dashes).
    """
    colour, dashes = style
    return (
        f'<svg class="swatch s{colour}" viewBox="0 0 26 10" aria-hidden="true">'
        f'<line x1="0" y1="5" x2="26" y2="5" stroke-dasharray="{dashes}"/></svg>'
    )
