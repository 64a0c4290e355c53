"""Handwritten digits, divided so that no split ever shows a digit of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
CLASSES = 10

# Shares of each class's digits; the rest is the test split's.
_TRAIN_SHARE, _VALIDATION_SHARE = 0.60, 0.15
# Fixed, whatever the scenes' seed: a detector trained on one seed never saw another's test digits.
_DIVISION_SEED = 1797
# Ink of load_digits goes from 0 to 16.
_INK_SCALE = 255 / 16
_ENLARGEMENT = 8
# Below this value an enlarged stroke is paper.
_INK_THRESHOLD = 64
_IS_INK = [0] * _INK_THRESHOLD + [255] * (256 - _INK_THRESHOLD)


@dataclass(frozen=True)
class Digit:
    """One handwritten digit.

    Attributes:
        label: 0 to 9.
        source: index into scikit-learn's ``load_digits``.
        ink: 8-bit greyscale picture, enlarged smoothly and cut to where there is ink.
    """

    label: int
    source: int
    ink: Image.Image


def divide(labels: NDArray[np.int64]) -> dict[SplitName, NDArray[np.int64]]:
    """Indices of the digits of each split: the same shares of every class."""
    generator = np.random.default_rng(_DIVISION_SEED)
    parts: dict[SplitName, list[NDArray[np.int64]]] = {name: [] for name in SPLITS}
    for label in range(CLASSES):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(generator.random(len(members)), kind="stable")]
        ends = [
            round(_TRAIN_SHARE * len(members)),
            round((_TRAIN_SHARE + _VALIDATION_SHARE) * len(members)),
        ]
        for name, part in zip(SPLITS, np.split(members, ends), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def load_divided_digits() -> dict[SplitName, list[Digit]]:
    """The digits of every split."""
    # Imported here: it takes a second, and only writing the benchmark needs it.
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = data.images, data.target.astype(np.int64)
    return {
        name: [Digit(int(labels[i]), int(i), _enlarge(images[i])) for i in members]
        for name, members in divide(labels).items()
    }


def _enlarge(image: NDArray[np.float64]) -> Image.Image:
    # A margin, so that strokes at the edge fade out instead of ending in a straight cut.
    padded = np.pad(np.round(image * _INK_SCALE).astype(np.uint8), 1)
    side = padded.shape[0] * _ENLARGEMENT
    smooth = Image.fromarray(padded).resize((side, side), Image.Resampling.BICUBIC)
    return smooth.crop(ink_box(smooth))


def ink_box(image: Image.Image) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what is drawn in an 8-bit greyscale image."""
    box = image.point(_IS_INK).getbbox()
    if box is None:
        raise ValueError("nothing is drawn in this image")
    return box
