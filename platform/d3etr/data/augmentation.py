"""Random changes of training images: drawn first, as plain numbers, then applied.

What is drawn depends on the generator alone, so a seed per (run, epoch, image) makes an image
look the same whichever process decodes it; and the size of the result is known before any
image is decoded, so batches of like shape can be planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from d3etr.config.data import AugmentationConfig, PreprocessingConfig
from d3etr.data.transforms import output_size, resize

_CHANNEL_ORDERS = tuple(permutations(range(3)))
_SMALLEST_CROP = 0.5
# A cropped object is kept if at least this much of each side is left, pixels.
_SMALLEST_BOX = 1.0


@dataclass(frozen=True)
class Augmentation:
    """What happens to one image, in this order; the defaults change nothing.

    Attributes:
        size: (height, width) in pixels at the end.
        teacher_size: the same for the teacher's eyes, where it sees another size; else None.
        crop: (top, left, height, width) in pixels of the original image.
        horizontal_flip: mirror left and right.
        vertical_flip: mirror top and bottom.
        jitter: factors of brightness, contrast and saturation (1 keeps), shift of the hue in
            turns (0 keeps).
        channels: the order of the colour channels.
        inverted: every value v becomes 255 - v.
    """

    size: tuple[int, int]
    crop: tuple[int, int, int, int] | None = None
    horizontal_flip: bool = False
    vertical_flip: bool = False
    jitter: tuple[float, float, float, float] | None = None
    channels: tuple[int, ...] | None = None
    inverted: bool = False
    teacher_size: tuple[int, int] | None = None

    @property
    def moves(self) -> bool:
        """Whether anything but resizing happens to where things are."""
        return self.crop is not None or self.horizontal_flip or self.vertical_flip


def sample_generator(seed: int, epoch: int, index: int) -> Random:
    """The generator of one image in one epoch."""
    # Text is hashed with SHA-512 into the seed; a NumPy generator takes three times as long.
    return Random(f"{seed}/{epoch}/{index}")


def draw_augmentation(
    width: int,
    height: int,
    augmentation: AugmentationConfig,
    preprocessing: PreprocessingConfig,
    generator: Random,
    teacher_scale: float = 1.0,
) -> Augmentation:
    """Draw what happens to an image of width x height pixels.

    ``teacher_scale`` is a factor on the sides that the teacher sees; it changes no draw.
    """
    # Always the same draws in the same places: switching one transform on leaves the others'
    # as they were.
    chance = [generator.random() for _ in range(15)]
    crop = None
    if chance[0] < augmentation.crop:
        crop = _crop_window(width, height, chance[1:5])
        height, width = crop[2:]
    sides = augmentation.shortest_sides
    shortest = None if sides is None else sides[int(chance[5] * len(sides))]
    permuted = chance[8] < augmentation.channel_permutation
    theirs = None
    if teacher_scale != 1:
        theirs = output_size(width, height, preprocessing, shortest, teacher_scale)
    return Augmentation(
        size=output_size(width, height, preprocessing, shortest),
        teacher_size=theirs,
        crop=crop,
        horizontal_flip=chance[6] < augmentation.horizontal_flip,
        vertical_flip=chance[7] < augmentation.vertical_flip,
        channels=_CHANNEL_ORDERS[int(chance[9] * len(_CHANNEL_ORDERS))] if permuted else None,
        inverted=chance[10] < augmentation.inversion,
        jitter=_jitter(augmentation.colour_jitter, chance[11:]),
    )


def _crop_window(width: int, height: int, chance: Sequence[float]) -> tuple[int, int, int, int]:
    shares = [_SMALLEST_CROP + (1 - _SMALLEST_CROP) * value for value in chance[:2]]
    rows, columns = max(1, round(height * shares[0])), max(1, round(width * shares[1]))
    top, left = int((height - rows + 1) * chance[2]), int((width - columns + 1) * chance[3])
    return top, left, rows, columns


def _jitter(strength: float, chance: Sequence[float]) -> tuple[float, float, float, float] | None:
    if strength == 0:
        return None
    brightness, contrast, saturation, hue = (strength * (2 * value - 1) for value in chance)
    return 1 + brightness, 1 + contrast, 1 + saturation, 0.1 * hue


def augment_pixels(pixels: Tensor, plan: Augmentation) -> Tensor:
    """[3, *plan.size] uint8 of ``pixels`` [3, h, w] uint8, which stay as they are."""
    if plan.crop is not None:
        pixels = functional.crop(pixels, *plan.crop)
    pixels = resize(pixels, plan.size)
    if plan.horizontal_flip:
        pixels = functional.horizontal_flip(pixels)
    if plan.vertical_flip:
        pixels = functional.vertical_flip(pixels)
    if plan.jitter is not None:
        # Channel after channel: most of what follows takes half the time on that.
        pixels = _apply_jitter(pixels.contiguous(), plan.jitter)
    if plan.channels is not None:
        pixels = pixels.index_select(0, torch.tensor(plan.channels))
    # Of an unsigned byte v this is 255 - v, at a quarter of the time.
    return pixels.bitwise_not() if plan.inverted else pixels


def _apply_jitter(pixels: Tensor, jitter: tuple[float, float, float, float]) -> Tensor:
    brightness, contrast, saturation, hue = jitter
    pixels = functional.adjust_brightness(pixels, brightness)
    pixels = functional.adjust_contrast(pixels, contrast)
    pixels = functional.adjust_saturation(pixels, saturation)
    turned: Tensor = functional.adjust_hue(pixels, hue)
    return turned


def augment_boxes(
    boxes_xyxy: NDArray[np.float64], image_size: tuple[int, int], plan: Augmentation
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Where boxes [n, 4] of an image of ``image_size`` (height, width) end up.

    Returns:
        [n, 4] in pixels of ``plan.size``, clipped to the image, and [n] bool: False where a
        crop left nothing of the object.
    """
    boxes = tv_tensors.BoundingBoxes(
        torch.from_numpy(boxes_xyxy), format="XYXY", canvas_size=image_size
    )
    if plan.crop is not None:
        boxes = functional.crop(boxes, *plan.crop)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= _SMALLEST_BOX).all(1).numpy()
    boxes = functional.resize(boxes, list(plan.size))
    if plan.horizontal_flip:
        boxes = functional.horizontal_flip(boxes)
    if plan.vertical_flip:
        boxes = functional.vertical_flip(boxes)
    moved: NDArray[np.float64] = functional.clamp_bounding_boxes(boxes).numpy()
    return moved, kept if plan.crop is not None else np.ones(len(moved), dtype=np.bool_)
