"""The same images side by side: what is on them, and what each run detects."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence

from d3etr.tracking.page.html import escape
from d3etr.tracking.pictures import SHARP_SIDE, Objects, Picture

MANY_OBJECTS = 12
"""More boxes than this are drawn without labels, which would cover the picture."""
WIDEST_PANEL = 17
"""Width of the letter m in the page's text."""


def scene(picture: Picture, number: int, names: Sequence[str]) -> str:
    """One image: the annotated objects, then each group's detections.

    Args:
        picture: the image.
        number: of the image on the page.
        names: of the groups.
    """
    source = base64.b64encode(picture.content).decode()
    # Stored once; the other panels point at it.
    image = (
        f'<image id="i{number}" width="{picture.width}" height="{picture.height}" '
        f'class="{_sharpness(picture)}" href="data:{picture.media_type};base64,{source}"/>'
    )
    panels = [_panel(picture, image, "annotated", picture.truth)]
    for name, detected in zip(names, picture.detections, strict=True):
        again = f'<use href="#i{number}"/>'
        panels.append(_absent(name) if detected is None else _panel(picture, again, name, detected))
    title = f'<p class="quiet">{escape(picture.title)}</p>'
    # A few panels do not fill a wide page.
    width = f"max-width:{WIDEST_PANEL * len(panels)}rem"
    grid = f'<div class="panels" style="{width}">{"".join(panels)}</div>'
    return f'<div class="scene">{title}{grid}</div>'


def verdict(truth: Objects, detected: Objects) -> str:
    """``3 of 4 found, 1 wrong``."""
    right = sum(detected.right or ())
    wrong = len(detected.names) - right
    return f"{right} of {len(truth.names)} found, {wrong} wrong"


def spoken(objects: Objects) -> str:
    """Names and scores in one line: ``3 0.92, 5 0.44 (wrong)``."""
    return ", ".join(_spoken_parts(objects)) or "nothing"


def _spoken_parts(objects: Objects) -> Iterable[str]:
    for index, name in enumerate(objects.names):
        score = "" if objects.scores is None else f" {objects.scores[index]:.2f}"
        wrong = objects.right is not None and not objects.right[index]
        yield f"{name}{score}{' (wrong)' if wrong else ''}"


def _panel(picture: Picture, image: str, name: str, objects: Objects) -> str:
    below = (
        f"{len(objects.names)} objects"
        if objects.right is None
        else verdict(picture.truth, objects)
    )
    label = escape(f"{name}: {spoken(objects)}")
    return (
        f'<figure class="panel"><svg viewBox="0 0 {picture.width} {picture.height}" role="img" '
        f'aria-label="{label}">{image}{_boxes(picture, objects)}</svg>'
        f"<figcaption><strong>{escape(name)}</strong>{below}</figcaption></figure>"
    )


def _absent(name: str) -> str:
    return (
        f'<figure class="panel"><div class="absent">no weights</div>'
        f"<figcaption><strong>{escape(name)}</strong>not shown</figcaption></figure>"
    )


def _boxes(picture: Picture, objects: Objects) -> str:
    """The least certain first, so that it is covered by the others."""
    order = range(len(objects.names))[::-1]
    labelled = len(objects.names) <= MANY_OBJECTS
    parts = [_box(objects, index) for index in order]
    parts += [_label(picture, objects, index) for index in order if labelled]
    return f'<g aria-hidden="true">{"".join(parts)}</g>'


def _box(objects: Objects, index: int) -> str:
    left, top, right, bottom = objects.boxes_xyxy[index]
    place = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
    kind = _kind(objects, index)
    return f'<rect class="box rim" {place}/><rect class="box {kind}" {place}/>'


def _label(picture: Picture, objects: Objects, index: int) -> str:
    """Above the box, or in it where the picture ends; below a wrong one, which often covers."""
    left, top, _, bottom = objects.boxes_xyxy[index]
    size = max(picture.width, picture.height) / 16
    above = top - size / 4 if top > 1.2 * size else top + size
    below = bottom + size if bottom + 1.2 * size < picture.height else bottom - size / 4
    y = below if _kind(objects, index) == "wrong" else above
    score = "" if objects.scores is None else f" {objects.scores[index]:.2f}"
    place = f'x="{max(left, 0.0):.1f}" y="{y:.1f}" style="font-size:{size:.2f}px"'
    return f"<text {place}>{escape(objects.names[index] + score)}</text>"


def _kind(objects: Objects, index: int) -> str:
    if objects.right is None:
        return "truth"
    return "right" if objects.right[index] else "wrong"


def _sharpness(picture: Picture) -> str:
    return "sharp" if max(picture.width, picture.height) <= SHARP_SIDE else ""
