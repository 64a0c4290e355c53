"""Images that can be decoded and are hardly meant so: what cameras and converters get wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

_LEAST_SIDE = 8
"""Smaller images may be of one colour."""
_DARK = 16
"""No pixel brighter than that, of 255: twelve bits stored in sixteen."""
_TEXTS = {
    "flat": "are of one colour, as a camera or converter that failed writes them",
    "dark": "have no pixel above 6 % of the range: 12-bit pixels in a 16-bit file must be scaled "
    "to all 16 bits",
    "transparent": "have transparent pixels: transparency is ignored, and what lies under it is "
    "seen",
}


def pixel_oddity(image: Image.Image, pixels: Image.Image) -> str:
    """What is odd about an image, or nothing: a key that ``pixel_warnings`` explains.

    Args:
        image: as stored.
        pixels: what a detector gets, RGB.
    """
    values = np.asarray(pixels)
    if min(pixels.size) >= _LEAST_SIDE and bool((values == values[0, 0]).all()):
        return "flat"
    if image.mode[0] == "I" and values.max() < _DARK:
        return "dark"
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if has_alpha and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        return "transparent"
    return ""


def pixel_warnings(
    found: Iterable[tuple[int, str]], shown_images: Callable[[list[int]], str]
) -> list[str]:
    """A sentence for each oddity.

    Args:
        found: image ids, and what ``pixel_oddity`` says of them.
        shown_images: text of image ids.
    """
    ids: dict[str, list[int]] = defaultdict(list)
    for number, oddity in found:
        ids[oddity].append(number)
    return [
        f"{len(numbers)} images {_TEXTS[oddity]} ({shown_images(numbers)})"
        for oddity, numbers in ids.items()
    ]
