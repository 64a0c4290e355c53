"""Detections drawn onto a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from d3etr.config.arguments import described
from d3etr.errors import UserError
from d3etr.fonts import font_for, readable_names
from d3etr.predictions import Detections, ImageLike, read_image

PALETTE = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#9a6324",
    "#f032e6",
    "#808000",
    "#000075",
)
"""Distinct on bright and dark grounds; white text is readable on each."""
READABLE_SIDE = 384
"""Smaller pictures are enlarged until their shorter side has this many pixels."""
LONGEST_SIDE = 4096
"""Pixels that no picture is enlarged beyond: strips stay narrow."""


def draw(image: ImageLike, detections: Detections) -> Image.Image:
    """A copy of the picture with a box, a name and a score for every detection.

    Args:
        image: the picture that the detections were made on.
        detections: their boxes are in its pixels.

    Returns:
        An RGB picture; small ones are enlarged by a whole factor, so that text fits.

    Raises:
        UserError: the picture cannot be read, or ``detections`` are none, or not finite.
    """
    if not isinstance(detections, Detections):
        raise UserError(
            f"detections is {described(detections)}; expected Detections, one of the list that "
            "predict returns"
        )
    boxes = np.asarray(detections.boxes_xyxy, dtype=float)
    if not np.isfinite(boxes).all():
        raise UserError("detections has boxes that are not finite; expected pixels of the picture")
    names = readable_names(zip(detections.labels.tolist(), detections.names, strict=True))
    texts = [f"{name} {score:.2f}" for name, score in zip(names, detections.scores, strict=True)]
    colours = [PALETTE[int(label) % len(PALETTE)] for label in detections.labels]
    return draw_boxes(read_image(image), boxes, texts, colours)


def draw_boxes(
    picture: Image.Image,
    boxes_xyxy: NDArray[np.floating],
    texts: Sequence[str],
    colours: Sequence[str],
) -> Image.Image:
    """A copy of the picture with boxes; small ones are enlarged, see ``draw``.

    Args:
        picture: RGB.
        boxes_xyxy: [K, 4] in its pixels; the first is drawn on top of the others.
        texts: K labels; an empty one is not drawn.
        colours: K colours, ``#rrggbb``.
    """
    readable = math.ceil(READABLE_SIDE / min(picture.size))
    factor = max(1, min(readable, LONGEST_SIDE // max(picture.size)))
    size = (picture.width * factor, picture.height * factor)
    drawn = picture.resize(size, Image.Resampling.NEAREST) if factor > 1 else picture.copy()
    canvas, width = ImageDraw.Draw(drawn), max(2, min(size) // 200)
    for box, text, colour in reversed(list(zip(boxes_xyxy, texts, colours, strict=True))):
        x1, y1, x2, y2 = (np.asarray(box) * factor).tolist()
        canvas.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=width)
        if text:
            _label(canvas, (x1, y1), text, colour, size)
    return drawn


def _label(
    canvas: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    colour: str,
    size: tuple[int, int],
) -> None:
    """Write on a filled ground above a box's upper left corner, or within the picture."""
    font = _font(text, max(12, min(size) // 24))
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0.0, min(corner[0], size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    canvas.rectangle((x, y, x + width, y + height), fill=colour)
    canvas.text((x + 2 - left, y + 2 - top), text, fill="white", font=font)


def _font(text: str, size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font, or one with the letters that it lacks."""
    found = None if text.isascii() else font_for(text)
    return ImageFont.load_default(size) if found is None else ImageFont.truetype(found, size)
