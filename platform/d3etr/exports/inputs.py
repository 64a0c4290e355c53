"""What an exported graph takes of a picture; PyTorch is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d3etr.data.preprocessing import normalise_pixels, output_size, resize_pixels
from d3etr.errors import UserError
from d3etr.exports.description import INPUTS, Description


def prepared(about: Description, image: Image.Image) -> NDArray[np.uint8]:
    """Uint8 [3, h, w] of an RGB image in the size that the graph is shown.

    Raises:
        UserError: it would be smaller than the graph takes.
    """
    rule = about.preprocessing
    size = output_size(image.width, image.height, rule)
    if min(size) < about.smallest:
        # The longest side decided where the shortest one is not what it was to be.
        narrow = rule.longest_side and min(size) < (rule.shortest_side or min(image.size))
        remedy = "it is too narrow for its length, cut it into pieces" if narrow else "enlarge it"
        raise UserError(
            f"the image is shown to the detector as {size[1]} x {size[0]} pixels, and this "
            f"exported file takes sides from {about.smallest} pixels on: {remedy}"
        )
    pixels = resize_pixels(np.asarray(image, dtype=np.uint8), size)
    return pixels.transpose(2, 0, 1)


def graph_inputs(
    about: Description, images: Sequence[NDArray[np.uint8]], sizes: Sequence[tuple[int, int]]
) -> dict[str, NDArray[Any]]:
    """Arrays by the names of the graph's inputs.

    Args:
        about: the file.
        images: B of what ``prepared`` returned, of one size.
        sizes: (height, width) in pixels of each image as given.
    """
    given = as_taken(about, np.stack(images)), np.array(sizes, dtype=np.int64)
    return dict(zip(INPUTS, given, strict=True))


def as_taken(about: Description, images: NDArray[np.uint8]) -> NDArray[Any]:
    """Pixels as the graph takes them: normalised, where it does not do that itself.

    Args:
        about: the file.
        images: [B, 3, h, w].
    """
    if about.inside:
        return images
    return np.stack(
        [normalise_pixels(image, about.preprocessing.normalisation) for image in images]
    )
