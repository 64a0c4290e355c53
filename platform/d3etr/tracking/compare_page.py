"""A comparison as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from d3etr.tracking.compare import Comparison, RunGroup, Spread
from d3etr.tracking.compare_text import (
    EQUAL_TIME_HEADINGS,
    RESULT_HEADINGS,
    equal_time_cells,
    equal_time_title,
    percent,
    result_cells,
)
from d3etr.tracking.equal_time import at_equal_time
from d3etr.tracking.page.chart import Curve, draw_curves
from d3etr.tracking.page.html import Cell, Head, escape, note, section, swatch, table
from d3etr.tracking.page.scenes import scene
from d3etr.tracking.page.style import STYLE, styles_of
from d3etr.tracking.pictures import THRESHOLD, Pictures

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load for the page: nothing from anywhere."""
LARGE, SMALL = (760, 340), (380, 300)
"""Width and height of the chart on a desk and on a phone."""


def write_page(comparison: Comparison, path: Path, pictures: Pictures | None = None) -> Path:
    """Write the page whole or not at all.

    Args:
        comparison: of the runs.
        path: an HTML file; its folder is made.
        pictures: what the runs detect on some images; None leaves the part out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(as_page(comparison, pictures), encoding="utf-8")
    return temporary.replace(path)


def as_page(comparison: Comparison, pictures: Pictures | None = None) -> str:
    """HTML: results, curves, images, differences, classes, and which runs these are."""
    styles = styles_of([group.title for group in comparison.groups])
    title = _title(comparison)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">Measured on the {comparison.split} split, in percent; gain in points '
        f"over {escape(comparison.baseline.label)}.</p>",
        *(note(caution) for caution in comparison.cautions()),
        _results(comparison, styles),
        _equal_time(comparison),
        section("Validation mAP during training", *_curves(comparison, styles)),
        "" if pictures is None else _pictures(comparison, pictures),
        _classes(comparison, styles),
        _differences(comparison, styles),
        _runs(comparison, styles),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    body = f"<main>{''.join(parts)}</main>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _title(comparison: Comparison) -> str:
    names = [group.label for group in comparison.groups]
    if len(names) > 4:
        return f"{len(names)} recipes compared: {', '.join(names[:3])} and others"
    return ", ".join(names) + (" compared" if len(names) > 1 else "")


Styles = Sequence[tuple[int, str]]


def _heads(comparison: Comparison, styles: Styles) -> list[Head]:
    groups = zip(comparison.groups, styles, strict=True)
    return [Head(group.label, swatch(style)) for group, style in groups]


def _results(comparison: Comparison, styles: Styles) -> str:
    rows = [
        (head, [Cell(text) for text in result_cells(comparison, group)])
        for head, group in zip(_heads(comparison, styles), comparison.groups, strict=True)
    ]
    columns = [Head(text) for text in ("run", *RESULT_HEADINGS)]
    return table("Results; after ± the deviation over seeds", columns, rows)


def _equal_time(comparison: Comparison) -> str:
    rows = at_equal_time(comparison)
    if not rows:
        return ""
    heads = [Head(text) for text in ("run", *EQUAL_TIME_HEADINGS)]
    cells = [(Head(r.group.label), [Cell(text) for text in equal_time_cells(r)]) for r in rows]
    return section("At equal time", table(equal_time_title(comparison, rows), heads, cells))


def _curves(comparison: Comparison, styles: Styles) -> list[str]:
    curves = [_curve(group, style) for group, style in zip(comparison.groups, styles, strict=True)]
    if not any(curve.points and not curve.level for curve in curves):
        curves = [replace(curve, level=False) for curve in curves]
    drawn = [curve for curve in curves if curve.points]
    if not drawn:
        return ["<p>No run was measured on the validation split while it trained.</p>"]
    summary = "; ".join(_summary(curve) for curve in drawn)
    several = any(curve.spread for curve in drawn)
    legend = "".join(f"<li>{swatch(c.style)}{escape(c.label)}</li>" for c in drawn)
    band = " The band is one deviation over seeds." if several else ""
    teachers = " A teacher is the level that it reached." if any(c.level for c in drawn) else ""
    return [
        f'<p class="quiet">In percent, at every measurement.{band}{teachers}</p>',
        f'<ul class="legend">{legend}</ul>',
        draw_curves(drawn, *LARGE, kind="large", summary=summary),
        draw_curves(drawn, *SMALL, kind="small", summary=summary),
        f"<details><summary>the numbers</summary>{_curve_table(drawn)}</details>",
    ]


def _curve(group: RunGroup, style: tuple[int, str]) -> Curve:
    measured = group.curve()
    spread = [
        (step, 100 * (at.mean - at.deviation), 100 * (at.mean + at.deviation))
        for step, at in measured.items()
        if at.deviation is not None
    ]
    points = [(step, 100 * at.mean) for step, at in measured.items()]
    # A teacher was trained before, often for far more steps than the students.
    level = group.title == "teacher"
    return Curve(group.label, points, style, [] if level else spread, level)


def _summary(curve: Curve) -> str:
    (first, start), (last, end) = curve.points[0], curve.points[-1]
    if len(curve.points) == 1:
        return f"{curve.label}: {end:.1f} at step {last:g}"
    return f"{curve.label}: from {start:.1f} at step {first:g} to {end:.1f} at step {last:g}"


def _curve_table(curves: Sequence[Curve]) -> str:
    steps = sorted({step for curve in curves for step, _ in curve.points})
    known = [dict(curve.points) for curve in curves]
    rows = [
        (
            Head(f"{step:,.0f}"),
            [Cell(f"{each[step]:.1f}" if step in each else "") for each in known],
        )
        for step in steps
    ]
    heads = [Head(curve.label, swatch(curve.style)) for curve in curves]
    return table("Validation mAP, %", [Head("step"), *heads], rows)


def _pictures(comparison: Comparison, pictures: Pictures) -> str:
    names = [group.label for group in comparison.groups]
    parts = [note(sentence) for sentence in pictures.missing]
    if pictures.pictures:
        seeds = " of each first seed" if any(len(g.runs) > 1 for g in comparison.groups) else ""
        parts.append(
            f'<p class="quiet">Detections{seeds} with a score of at least {THRESHOLD:g}. Solid: '
            "an annotated object of that class is there. Dashed: there is none, or it was found "
            "already.</p>"
        )
        parts += [scene(each, i, names) for i, each in enumerate(pictures.pictures)]
    return section(f"The same {pictures.split} images", *parts)


def _classes(comparison: Comparison, styles: Styles) -> str:
    rows = [
        (Head(name), _class_cells(spreads, styles))
        for name, spreads in comparison.classes().items()
    ]
    if not rows:
        return ""
    heads = [Head("class"), *_heads(comparison, styles)]
    caption = f"Average precision on the {comparison.split} split, %; the best is bold"
    return section("Each class", table(caption, heads, rows))


def _class_cells(spreads: Sequence[Spread | None], styles: Styles) -> list[Cell]:
    best = max((spread.mean for spread in spreads if spread is not None), default=0.0)
    return [
        Cell("-")
        if spread is None
        else Cell(
            percent(spread),
            f"bar s{colour}{' best' if spread.mean == best and len(spreads) > 1 else ''}",
            100 * spread.mean,
        )
        for spread, (colour, _) in zip(spreads, styles, strict=True)
    ]


def _differences(comparison: Comparison, styles: Styles) -> str:
    differing = comparison.differences()
    if not differing:
        return ""
    names = [group.label for group in comparison.groups]
    base = comparison.groups.index(comparison.baseline)
    rows = [
        (Head(key), [Cell(value, "" if value == values[base] else "other") for value in values])
        for key, values in differing.items()
    ]
    caption = f"Settings that are not the same everywhere; marked: unlike {names[base]}"
    heads = [Head("setting"), *_heads(comparison, styles)]
    return section("What sets them apart", table(caption, heads, rows, "settings"))


def _runs(comparison: Comparison, styles: Styles) -> str:
    rows = [
        (head, [Cell(str(run.seed)), Cell(run.folder.name)])
        for head, group in zip(_heads(comparison, styles), comparison.groups, strict=True)
        for run in group.runs
    ]
    columns = [Head("run"), Head("seed"), Head("folder")]
    return section("Runs", table("Where the numbers come from", columns, rows))
