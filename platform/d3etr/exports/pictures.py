"""Real pictures of several sizes, by which an export is compared with the detector it is of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from d3etr.config.data import PreprocessingConfig
from d3etr.data.images import load_image
from d3etr.data.transforms import resize, resized

_CROPS = ((0.0, 0.0, 1.0, 1.0), (0.1, 0.0, 0.55, 0.9), (0.3, 0.2, 0.85, 0.95))
"""Wide, high, nearly square: as x1, y1, x2, y2 in shares of a photograph's sides."""
_UNSIZED = 192
"""Longer side of photographs, pixels, for detectors whose preprocessing keeps images' sizes."""


@dataclass(frozen=True)
class PictureBatch:
    """Pictures of one size once they are resized.

    Attributes:
        pixels: [B, 3, h, w] uint8.
        sizes: (height, width) in pixels of each before that.
    """

    pixels: Tensor
    sizes: tuple[tuple[int, int], ...]


def picture_batches(
    preprocessing: PreprocessingConfig, size: tuple[int, int] | None, files: Sequence[Path] = ()
) -> Iterator[PictureBatch]:
    """Batches of one picture each, and one of several.

    Args:
        preprocessing: gives the size of what a detector is shown.
        size: (height, width) of all of them, in its place.
        files: pictures; none: crops of two photographs that scikit-learn brings.

    Raises:
        UserError: a file is no picture.
    """
    pictures = raw_pictures(files, bool(size or preprocessing.shortest_side))
    shown = [
        resize(resized(picture, _KEPT), size) if size else resized(picture, preprocessing)
        for picture in pictures
    ]
    sizes = [(picture.height, picture.width) for picture in pictures]
    for pixels, given in zip(shown, sizes, strict=True):
        yield PictureBatch(pixels[None], (given,))
    several = [resize(pixels, (shown[0].shape[1], shown[0].shape[2])) for pixels in shown[:3]]
    if len(several) > 1:
        yield PictureBatch(torch.stack(several), tuple(sizes[:3]))


_KEPT = PreprocessingConfig(shortest_side=None, longest_side=None)


def raw_pictures(files: Sequence[Path], sized: bool) -> list[Image.Image]:
    """Pictures before they are resized: those of files, or crops of two photographs.

    Args:
        files: pictures; none: the photographs.
        sized: whether the detector resizes them; else they are made small.

    Raises:
        UserError: a file is no picture.
    """
    return [load_image(file) for file in files] or _photographs(sized)


def _photographs(sized: bool) -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    found = []
    for number, pixels in enumerate(load_sample_images().images):
        photograph = Image.fromarray(pixels)
        if not sized:
            photograph.thumbnail((_UNSIZED + 32 * number, _UNSIZED + 32 * number))
        width, height = photograph.size
        crops = _CROPS if number == 0 else _CROPS[1:]
        for x1, y1, x2, y2 in crops:
            box = (int(x1 * width), int(y1 * height), int(x2 * width), int(y2 * height))
            found.append(photograph.crop(box))
    return found
