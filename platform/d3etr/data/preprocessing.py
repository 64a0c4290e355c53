"""Sizes and pixels of what a detector is shown, without PyTorch.

Resizing rounds as torchvision's does, so that detectors see the same pixels wherever they run.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from d3etr.data.images import MAXIMUM_MEGAPIXELS
from d3etr.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of torchvision's ImageNet weights, for pixels in [0, 1]."""
STD_FLOOR = 0.02
"""Keeps an even channel finite; as a share of the pixel range."""
VERY_LONG = 32
"""Sides of images in a ratio above this: a pixel of the short one is many of the long one."""
_MOST_BITS = 22
_WEIGHT_LIMIT = 2**15
"""Weights of a pixel are whole numbers of 16 bits, as PyTorch and Pillow have them."""


class SizeRule(Protocol):
    """What ``config.data.PreprocessingConfig`` says about sizes."""

    @property
    def shortest_side(self) -> int | None:
        """Pixels of the shorter side, or None."""
        ...

    @property
    def longest_side(self) -> int | None:
        """Pixels of the longer side at most, or None."""
        ...

    @property
    def exact_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels, or None."""
        ...


def output_size(
    width: int,
    height: int,
    config: SizeRule,
    shortest: int | None = None,
    scale: float = 1.0,
) -> tuple[int, int]:
    """(height, width) after resizing: ``config.exact_size``, or by DETR's rule.

    An exact size keeps its aspect where ``shortest`` is its shorter side in place of its own. By
    DETR's rule, the shorter side becomes ``shortest`` pixels (the configuration's where it is
    None); where the longer one would then pass ``config.longest_side``, that decides instead: of
    ``VERY_LONG`` images to the pixel, of others as far as DETR's rounding of the shorter side to
    whole pixels has it. Both sides are multiplied by ``scale`` first.

    Raises:
        UserError: it would be enlarged to more than ``MAXIMUM_MEGAPIXELS``.
    """
    if config.exact_size is not None:
        factor = scale if shortest is None else scale * shortest / min(config.exact_size)
        rows, columns = (max(1, round(factor * exact)) for exact in config.exact_size)
        return rows, columns
    low, high = min(width, height), max(width, height)
    side, longest = shortest or config.shortest_side or low, config.longest_side
    if scale != 1:
        side, longest = max(1, round(scale * side)), longest and round(scale * longest)
    if longest is not None and high / low * side > longest:
        side = max(1, round(longest * low / high))
        if high > VERY_LONG * low:
            return (longest, side) if width < height else (side, longest)
    if side == low:
        return height, width
    if side * int(side * high / low) > max(low * high, MAXIMUM_MEGAPIXELS * 1e6):
        raise UserError(
            f"the image has {width} x {height} pixels, and with a shorter side of {side} it would "
            f"have {side * side * high / low / 1e6:,.0f} megapixels; expected at most "
            f"{MAXIMUM_MEGAPIXELS:g}: cut it into less narrow pieces, or train with "
            "data.preprocessing.longest_side"
        )
    if width < height:
        return int(side * height / width), side
    return side, int(side * width / height)


def resize_pixels(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Bilinear and antialiased, in PyTorch's whole numbers.

    Args:
        pixels: [height, width, channels].
        size: (height, width) afterwards.
    """
    for axis in (1, 0):  # rows first, rounded in between
        if pixels.shape[axis] != size[axis]:
            pixels = _resize_axis(pixels, axis, size[axis])
    return pixels


def _resize_axis(pixels: NDArray[np.uint8], axis: int, size: int) -> NDArray[np.uint8]:
    begins, weights, bits = _taps(pixels.shape[axis], size)
    shape = [1, 1, 1]
    shape[axis] = size
    total: NDArray[np.int32] | None = None
    for tap in range(weights.shape[1]):
        places = np.minimum(begins + tap, pixels.shape[axis] - 1)
        part = np.take(pixels, places, axis).astype(np.int32)
        part *= weights[:, tap].reshape(shape)
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None
    total += 1 << (bits - 1)
    total >>= bits
    return np.clip(total, 0, 255, out=total).astype(np.uint8)


def _taps(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """First pixel and weights of each pixel afterwards, and the weights' bits behind the point."""
    scale = source / target
    support = max(scale, 1.0)
    centres = scale * (np.arange(target) + 0.5)
    begins = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    counts = np.minimum((centres + support + 0.5).astype(np.int64), source) - begins
    taps = np.arange(int(counts.max()))
    distance = np.abs((taps + (begins - centres)[:, None] + 0.5) / support)
    weights = np.where(distance < 1, 1 - distance, 0.0) * (taps < counts[:, None])
    weights /= weights.sum(1, keepdims=True)
    highest, bits = float(weights.max()), 0
    while bits < _MOST_BITS and int(0.5 + highest * (1 << (bits + 1))) < _WEIGHT_LIMIT:
        bits += 1
    return begins, (0.5 + weights * (1 << bits)).astype(np.int32), bits


def normalise_pixels(pixels: NDArray[np.uint8], normalisation: str) -> NDArray[np.float32]:
    """Float32 of uint8 pixels [3, h, w] of one image; as ``data.transforms.normalise``.

    Args:
        pixels: of one image.
        normalisation: imagenet, per_image or unit.
    """
    values = pixels.astype(np.float32)
    if normalisation == "unit":
        return values / np.float32(255)
    if normalisation == "imagenet":
        mean, std = (_column(x) * np.float32(255) for x in (IMAGENET_MEAN, IMAGENET_STD))
        scaled: NDArray[np.float32] = (values - mean) / std
        return scaled
    values -= values.mean((1, 2), keepdims=True, dtype=np.float64).astype(np.float32)
    norm = np.linalg.norm(values.reshape(len(values), -1), axis=1)[:, None, None]
    floor = np.float32(STD_FLOOR * 255)
    divided: NDArray[np.float32] = values / (norm / np.float32(math.sqrt(values[0].size)) + floor)
    return divided


def _column(values: Any) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)[:, None, None]
