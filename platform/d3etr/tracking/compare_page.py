"""A comparison as one HTML page that needs nothing else."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from d3etr.tracking.compare import Comparison
from d3etr.tracking.compare_text import (
    RESULT_HEADINGS,
    label,
    percent,
    result_cells,
)

if TYPE_CHECKING:
    from d3etr.tracking.figures.style import Stroke

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e3e3e3;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; border-bottom: 2px solid #bbb; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.settings th { text-align: left; }
.caution { background: #fff6e0; padding: .4rem .8rem; border-left: 3px solid #e69f00; }
svg { max-width: 46rem; height: auto; }
"""


def write_page(comparison: Comparison, path: Path) -> Path:
    """Write the page whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(as_page(comparison), encoding="utf-8")
    return temporary.replace(path)


def as_page(comparison: Comparison) -> str:
    """HTML with the tables of the terminal and the training curves as inline SVG."""
    names = [label(group) for group in comparison.groups]
    results = [[label(g), *result_cells(comparison, g)] for g in comparison.groups]
    differing = [[key, *values] for key, values in comparison.differences().items()]
    classes = [
        [name, *(percent(spread) for spread in spreads)]
        for name, spreads in comparison.classes().items()
    ]
    title = "Comparison of " + ", ".join(names)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>Measured on the {comparison.split} split, in percent; gain in points over "
        f"{escape(label(comparison.baseline))}.</p>",
        *(f'<p class="caution">{escape(caution)}</p>' for caution in comparison.cautions()),
        _table(["run", *RESULT_HEADINGS], results),
        "<h2>Validation mAP during training</h2>",
        _curves(comparison),
        _section("What sets them apart", ["setting", *names], differing, "settings"),
        _section("AP per class, %", ["class", *names], classes),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def _styles(titles: Sequence[str]) -> list[tuple[str, Stroke]]:
    """Colours of teacher, plain and distilled student while few groups share one."""
    from d3etr.tracking.figures.style import PLAIN, STROKES, STUDENT, TEACHER, series_styles

    if max(titles.count(title) for title in titles) > len(STROKES):
        return series_styles(len(titles))
    known = {"teacher": TEACHER, "plain student": PLAIN}
    return [
        (known.get(title, STUDENT), STROKES[titles[:place].count(title)])
        for place, title in enumerate(titles)
    ]


def _section(title: str, headings: Sequence[str], rows: list[list[str]], kind: str = "") -> str:
    return f"<h2>{escape(title)}</h2>{_table(headings, rows, kind)}" if rows else ""


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{_breakable(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def _breakable(text: str) -> str:
    """Escaped; long dotted keys may break where a person would break them."""
    return (
        re.sub(r"(?<=\w)([._/])(?=\w)", r"\1<wbr>", escape(text))
        if len(text) > 24
        else escape(text)
    )


def _curves(comparison: Comparison) -> str:
    # matplotlib takes a second to import: only who draws pays.
    from d3etr.tracking.figures.curves import Series, draw_training

    styles = _styles([group.title for group in comparison.groups])
    series = [
        Series(
            label(group) if number == 0 else "",
            [step for step, _ in run.curve],
            [value for _, value in run.curve],
            colour,
            stroke,
        )
        for group, (colour, stroke) in zip(comparison.groups, styles, strict=True)
        for number, run in enumerate(group.runs)
    ]
    drawn = io.StringIO()
    draw_training(series, title="").savefig(drawn, format="svg")
    return re.sub(r"^.*?(?=<svg)", "", drawn.getvalue(), flags=re.DOTALL)
