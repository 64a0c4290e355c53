"""A comparison as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from tempfile import TemporaryDirectory

import PIL.Image
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from d3etr.files import write_whole
from d3etr.text import printable
from d3etr.tracking.compare import tables
from d3etr.tracking.compare.comparison import Comparison
from d3etr.tracking.compare.pictures import Pictures
from d3etr.tracking.figures.curves import Series, draw_series
from d3etr.tracking.figures.images import Objects, Scene
from d3etr.tracking.figures.look import THRESHOLD
from d3etr.tracking.figures.style import save, series_styles

LONGEST_SIDE = 512
"""Pixels of an image in the page."""


def write_page(comparison: Comparison, path: Path, pictures: Pictures | None = None) -> Path:
    """Write the page whole or not at all.

    Args:
        comparison: of the runs.
        path: an HTML file; its folder is made.
        pictures: what the runs detect on some images; None leaves the part out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, as_page(comparison, pictures))
    return path


def as_page(comparison: Comparison, pictures: Pictures | None = None) -> str:
    """HTML: results, curves, images, differences, classes, and which runs these are."""
    environment = Environment(
        loader=PackageLoader("d3etr.tracking", "compare"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda shown: shown if isinstance(shown, Markup) else printable(shown),
    )
    labels = [group.label for group in comparison.groups]
    curves = curves_of(comparison)
    return environment.get_template("page.html").render(
        title=", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if labels[4:] else ""),
        comparison=comparison,
        base=comparison.groups.index(comparison.baseline),
        tables=tables,
        curves=curves,
        chart=_chart(curves) if curves else "",
        pictures=pictures,
        panels=_panels,
        threshold=THRESHOLD,
    )


def curves_of(comparison: Comparison) -> list[Series]:
    """Validation mAP of the groups that were measured while they trained."""
    # A teacher was trained before, often for far more steps than the students: it is a level.
    students = any(group.curve() for group in comparison.students)
    return [
        Series(
            group.label,
            list(curve),
            [at.mean for at in curve.values()],
            colour,
            stroke,
            [at.deviation or 0.0 for at in curve.values()],
            level=students and group.title == "teacher",
        )
        for group, (colour, stroke) in zip(
            comparison.groups, series_styles(len(comparison.groups)), strict=True
        )
        if (curve := group.curve())
    ]


def _chart(curves: list[Series]) -> str:
    with TemporaryDirectory() as folder:
        file = save(draw_series(curves, "mAP (%)"), Path(folder, "chart.svg"))
        return _data_uri("svg+xml", file.read_bytes())


def _panels(picture: Scene) -> list[tuple[str, str, str, str]]:
    """The annotated image and what each group detects: name, address, in words, verdict."""
    found = []
    for name, objects in [("annotated", picture.truth), *picture.detections.items()]:
        if objects is None:
            found.append((name, "", "", "no weights"))
            continue
        words = ", ".join(objects.labels) or "nothing"
        image = objects.drawn(picture.image)
        found.append((name, _address(image), words, _verdict(objects, picture.truth)))
    return found


def _address(image: PIL.Image.Image) -> str:
    """The image itself as an address."""
    stored = io.BytesIO()
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    image.save(stored, "JPEG", quality=85)
    return _data_uri("jpeg", stored.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _verdict(detected: Objects, truth: Objects) -> str:
    """``3 of 4 found, 1 wrong``; of annotated objects their number."""
    if detected.right is None:
        return f"{len(detected.names)} objects"
    right = sum(detected.right)
    return f"{right} of {len(truth.names)} found, {len(detected.names) - right} wrong"
