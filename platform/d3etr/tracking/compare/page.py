"""A comparison as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from d3etr.files import atomic_write
from d3etr.text import printable
from d3etr.tracking.compare.comparison import Comparison, RunGroup
from d3etr.tracking.compare.pictures import THRESHOLD, Pictures
from d3etr.tracking.compare.tables import (
    classes_table,
    curves_table,
    differences_table,
    equal_time_table,
    results_table,
    runs_table,
)
from d3etr.tracking.figures.curves import Series, draw_training
from d3etr.tracking.figures.images import MANY_OBJECTS, SHARP_SIDE, Objects
from d3etr.tracking.figures.style import STROKES, Stroke, as_svg

COLOURS = (
    ("#0067a5", "#5cb3f0"),
    ("#6b6b6b", "#a9a9a9"),
    ("#c75000", "#ff9147"),
    ("#00825f", "#35cfa2"),
    ("#a34a80", "#e79ac8"),
    ("#0b7b8a", "#5fd0df"),
    ("#8a6100", "#e6bb2e"),
    ("#1d1d1f", "#f2f2f2"),
)
"""(on a light, on a dark ground) of one group of runs each; the first three are those of
teacher, plain student and distilled student in all figures."""
OWN_COLOURS = {"teacher": 0, "plain student": 1}
DISTILLED = 2
SIZES = {"large": (7.8, 3.5), "small": (3.9, 3.1)}
"""Inches of the chart on a desk and on a phone."""
LONGEST_SIDE = 512
"""Pixels of a large image in the page."""
LONGEST_WORD = 12

Style = tuple[int, Stroke]
"""Index into ``COLOURS`` and the line style of a group."""


def write_page(comparison: Comparison, path: Path, pictures: Pictures | None = None) -> Path:
    """Write the page whole or not at all.

    Args:
        comparison: of the runs.
        path: an HTML file; its folder is made.
        pictures: what the runs detect on some images; None leaves the part out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    page = as_page(comparison, pictures)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def as_page(comparison: Comparison, pictures: Pictures | None = None) -> str:
    """HTML: results, curves, images, differences, classes, and which runs these are."""
    styles = styles_of([group.title for group in comparison.groups])
    labels = [group.label for group in comparison.groups]
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=_title(labels),
            comparison=comparison,
            labels=labels,
            styles={
                label: f"s{colour} dash{STROKES.index(stroke)}"
                for label, (colour, stroke) in zip(labels, styles, strict=True)
            },
            base=comparison.groups.index(comparison.baseline),
            colours=COLOURS,
            results=results_table(comparison),
            equal_time=equal_time_table(comparison),
            curves=_curves(comparison.groups, styles),
            charts=_charts,
            several_seeds=any(len(group.runs) > 1 for group in comparison.groups),
            numbers=curves_table(comparison),
            pictures=pictures,
            threshold=THRESHOLD,
            classes=classes_table(comparison),
            differences=differences_table(comparison),
            runs=runs_table(comparison),
        )
    )


@cache
def _environment() -> Environment:
    """Templates in which every text is escaped and every character shows."""
    made = Environment(
        loader=PackageLoader("d3etr.tracking", "compare"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda shown: shown if isinstance(shown, Markup) else printable(shown),
    )
    made.filters |= {
        "breakable": _breakable,
        "address": _address,
        "spoken": _spoken,
        "verdict": _verdict,
        "marks": _marks,
    }
    made.tests["any"] = any
    made.globals["sharp_side"] = SHARP_SIDE
    return made


def _title(labels: Sequence[str]) -> str:
    if len(labels) > 4:
        return f"{len(labels)} recipes compared: {', '.join(labels[:3])} and others"
    return ", ".join(labels) + (" compared" if len(labels) > 1 else "")


def styles_of(titles: Sequence[str]) -> list[Style]:
    """Colour and line style of each group: no two alike while there are enough.

    Args:
        titles: teacher, plain student, D3ETR student.
    """
    wanted = [OWN_COLOURS.get(title, DISTILLED) for title in titles]
    others = [index for index in range(len(COLOURS)) if index not in wanted]
    chosen: list[Style] = []
    spare = 0
    for place, colour in enumerate(wanted):
        if wanted.index(colour) == place:
            chosen.append((colour, STROKES[0]))
            continue
        turn, index = divmod(spare, len(others))
        chosen.append((others[index], STROKES[turn % len(STROKES)]))
        spare += 1
    return chosen


def _curves(groups: Sequence[RunGroup], styles: Sequence[Style]) -> list[Series]:
    """Validation mAP of the groups that were measured while they trained."""
    measured = [
        (group, style) for group, style in zip(groups, styles, strict=True) if group.curve()
    ]
    # A teacher was trained before, often for far more steps than the students: it is a level.
    students = any(group.title != "teacher" for group, _ in measured)
    return [
        Series(
            group.label,
            list(group.curve()),
            [at.mean for at in group.curve().values()],
            COLOURS[colour][0],
            stroke,
            [at.deviation or 0.0 for at in group.curve().values()],
            level=students and group.title == "teacher",
        )
        for group, (colour, stroke) in measured
    ]


def _charts(curves: Sequence[Series]) -> list[Markup]:
    """The curves for a desk and for a phone."""
    spoken = "; ".join(map(_summary, curves))
    colours = {light: f"var(--s{index})" for index, (light, _) in enumerate(COLOURS)}
    return [
        as_svg(draw_training(curves, "", inches=inches, key=False), size, spoken, colours)
        for size, inches in SIZES.items()
    ]


def _summary(series: Series) -> str:
    (first, start), (last, end) = (
        (series.steps[place], 100 * series.values[place]) for place in (0, -1)
    )
    if series.level:
        return f"{series.label}: the level {end:.1f}"
    if len(series.steps) == 1:
        return f"{series.label}: {end:.1f} at step {last:g}"
    return f"{series.label}: from {start:.1f} at step {first:g} to {end:.1f} at step {last:g}"


def _breakable(text: str) -> Markup:
    """Long dotted keys and paths may break where a person would break them."""
    safe = escape(printable(text))
    if len(text) <= LONGEST_WORD or " " in text:
        return safe
    return Markup(re.sub(r"(?<=\w)([._/])(?=\w)", r"\1<wbr>", str(safe)))


def _address(pixels: NDArray[np.uint8]) -> str:
    """The image itself as an address: small ones pixel by pixel, others smaller and as JPEG."""
    image, stored = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= SHARP_SIDE:
        image.save(stored, "PNG", optimize=True)
    else:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        image.save(stored, "JPEG", quality=82)
    kind = "png" if max(pixels.shape) <= SHARP_SIDE else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stored.getvalue()).decode()}"


def _verdict(detected: Objects, truth: Objects) -> str:
    """``3 of 4 found, 1 wrong``; of annotated objects their number."""
    if detected.right is None:
        return f"{len(detected.names)} objects"
    right = sum(detected.right)
    return f"{right} of {len(truth.names)} found, {len(detected.names) - right} wrong"


def _spoken(objects: Objects) -> str:
    """Names and scores in one line: ``3 0.92, 5 0.44 (wrong)``."""
    pairs = zip(objects.labels, _kinds(objects), strict=True)
    parts = [f"{label}{' (wrong)' if kind == 'wrong' else ''}" for label, kind in pairs]
    return ", ".join(parts) or "nothing"


def _kinds(objects: Objects) -> list[str]:
    if objects.right is None:
        return ["truth"] * len(objects.names)
    return ["right" if right else "wrong" for right in objects.right]


def _marks(objects: Objects, width: int, height: int) -> list[dict[str, Any]]:
    """Boxes with the places of their labels, the least certain first: others cover it."""
    size = max(width, height) / 16
    found = []
    columns = zip(objects.boxes_xyxy, objects.labels, _kinds(objects), strict=True)
    for (left, top, right, bottom), label, kind in columns:
        # Above the box, or in it where the picture ends; below a wrong one, which often covers.
        y = top - size / 4 if top > 1.2 * size else top + size
        if kind == "wrong":
            y = bottom + size if bottom + 1.2 * size < height else bottom - size / 4
        mark = {"left": left, "top": top, "width": right - left, "height": bottom - top}
        mark |= {"x": max(left, 0.0), "y": y, "size": size, "kind": kind}
        found.append(mark | {"label": label if len(objects.names) <= MANY_OBJECTS else ""})
    return found[::-1]
