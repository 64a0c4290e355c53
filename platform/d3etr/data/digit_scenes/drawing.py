"""One scene: handwritten digits of random size and colour on a gradient, among clutter and noise.

Digits are divided so that no split ever shows a digit of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from d3etr.config.data import DigitScenesConfig
from d3etr.errors import UserError

Box = tuple[int, int, int, int]
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


# Random numbers come from `random` and `integers` alone: NumPy's other distributions have
# changed between versions, and a benchmark must not.
_HIGHEST_IOU = 0.15
_LOWEST_CONTRAST = 0.35
_COLOUR_CANDIDATES = 64
_PLACING_ATTEMPTS = 100
_STROKES, _BLOBS = (2, 5), (1, 3)
_HIGHEST_NOISE = 24
# Side in pixels that clutter sizes are written for.
_REFERENCE_SIDE = 64


@dataclass(frozen=True)
class Scene:
    """A picture and its ground truth; n digits.

    Attributes:
        pixels: [height, width, 3].
        digits: n of them.
        boxes_xyxy: n tight boxes (left, top, right, bottom) in whole pixels.
    """

    pixels: NDArray[np.uint8]
    digits: tuple[Digit, ...]
    boxes_xyxy: tuple[Box, ...]


def draw_scene(
    config: DigitScenesConfig, split: SplitName, index: int, digits: list[Digit]
) -> Scene:
    """Scene ``index`` of a split: depends on the settings, the seed, the split and the index.

    Raises:
        UserError: the settings want more digits than fit.
    """
    generator = np.random.default_rng((config.seed, SPLITS.index(split), index))
    canvas = _background(config.image_size, generator)
    count = int(generator.integers(config.minimum_objects, config.maximum_objects + 1))
    shown: list[Digit] = []
    boxes: list[Box] = []
    for _ in range(count):
        digit = digits[int(generator.integers(len(digits)))]
        box = _place(config, digit, canvas, boxes, generator)
        if box is None:
            break
        shown.append(digit)
        boxes.append(box)
    if len(boxes) < config.minimum_objects:
        raise UserError(
            f"data.digit_scenes: {config.minimum_objects} digits of {config.minimum_scale} to "
            f"{config.maximum_scale} pixels do not fit into {config.image_size} x "
            f"{config.image_size}: lower minimum_objects or maximum_scale, or raise image_size"
        )
    pixels = _with_noise(np.asarray(canvas), generator)
    return Scene(pixels, tuple(shown), tuple(boxes))


def _background(side: int, generator: np.random.Generator) -> Image.Image:
    """A gradient between two colours in a random direction, with strokes and blobs on it."""
    first, second = generator.random((2, 3))
    direction = generator.random(2) - 0.5
    steps = np.linspace(-1, 1, side)
    ramp = steps[:, None] * direction[0] + steps[None, :] * direction[1]
    ramp = (ramp + 1)[:, :, None] / 2
    pixels = np.floor((first + ramp * (second - first)) * 255 + 0.5).astype(np.uint8)
    canvas = Image.fromarray(pixels)
    draw = ImageDraw.Draw(canvas, "RGBA")
    for _ in range(int(generator.integers(_BLOBS[0], _BLOBS[1] + 1))):
        _draw_blob(draw, side, generator)
    for _ in range(int(generator.integers(_STROKES[0], _STROKES[1] + 1))):
        _draw_stroke(draw, side, generator)
    return canvas


def _draw_blob(draw: ImageDraw.ImageDraw, side: int, generator: np.random.Generator) -> None:
    centre = generator.random(2) * side
    radii = (4 + 10 * generator.random(2)) * side / _REFERENCE_SIDE
    corners = [*(centre - radii).tolist(), *(centre + radii).tolist()]
    draw.ellipse(corners, fill=_translucent(generator, 60, 160))


def _draw_stroke(draw: ImageDraw.ImageDraw, side: int, generator: np.random.Generator) -> None:
    """A bent line of about a digit's size and width."""
    start = generator.random(2) * side
    reach = (generator.random((2, 2)) - 0.5) * 28 * side / _REFERENCE_SIDE
    points = [tuple(point) for point in (start, start + reach[0], start + reach[0] + reach[1])]
    width = max(1, round((1 + 2 * generator.random()) * side / _REFERENCE_SIDE))
    draw.line(points, fill=_translucent(generator, 100, 255), width=width)


def _translucent(
    generator: np.random.Generator, lowest: int, highest: int
) -> tuple[int, int, int, int]:
    red, green, blue = generator.integers(0, 256, 3).tolist()
    return red, green, blue, int(generator.integers(lowest, highest + 1))


def _place(
    config: DigitScenesConfig,
    digit: Digit,
    canvas: Image.Image,
    taken: list[Box],
    generator: np.random.Generator,
) -> Box | None:
    """Draw ``digit`` where it hardly overlaps the others; None where no place was found."""
    for chance in generator.random((_PLACING_ATTEMPTS, 3)).tolist():
        # Log-uniform: as many digits from 10 to 14 pixels as from 20 to 28.
        ratio = config.maximum_scale / config.minimum_scale
        scale = round(config.minimum_scale * ratio ** chance[0]) / max(digit.ink.size)
        width, height = (max(1, round(side * scale)) for side in digit.ink.size)
        left = int(chance[1] * (config.image_size - width + 1))
        top = int(chance[2] * (config.image_size - height + 1))
        box = (left, top, left + width, top + height)
        if all(_iou(box, other) <= _HIGHEST_IOU for other in taken):
            ink = digit.ink.resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(_contrasting(canvas.crop(box), generator), box, ink)
            tight = ink_box(ink)
            return left + tight[0], top + tight[1], left + tight[2], top + tight[3]
    return None


def _contrasting(behind: Image.Image, generator: np.random.Generator) -> tuple[int, int, int]:
    """A colour that differs from the mean of ``behind`` by more than 0.35 over the channels."""
    # Shrinking to one pixel is the mean, in whole numbers.
    mean = np.array(behind.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)), dtype=np.int64)
    candidates = generator.integers(0, 256, (_COLOUR_CANDIDATES, 3))
    contrast = np.abs(candidates - mean).sum(1) / (3 * 255)
    good = np.flatnonzero(contrast > _LOWEST_CONTRAST)
    chosen = candidates[good[0] if len(good) else np.argmax(contrast)]
    red, green, blue = chosen.tolist()
    return red, green, blue


def _iou(first: Box, second: Box) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def _with_noise(pixels: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    strength = int(generator.integers(0, _HIGHEST_NOISE + 1))
    noise = generator.integers(-strength, strength, pixels.shape, dtype=np.int16, endpoint=True)
    noisy: NDArray[np.uint8] = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return noisy
