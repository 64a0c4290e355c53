"""Random changes of training images: drawn first, as plain numbers, then applied.

What is drawn depends on the generator alone, so a seed per (run, epoch, image) makes an image
look the same whichever process decodes it; and the size of the result is known before any
image is decoded, so batches of like shape can be planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from d3etr.config.data import AugmentationConfig, PreprocessingConfig
from d3etr.data.preprocessing import output_size
from d3etr.data.records import ImageRecord
from d3etr.data.strong import (
    CHANNEL_ORDERS,
    UNCHANGED,
    Scene,
    Strong,
    change_boxes,
    change_pixels,
    draw_strong,
)
from d3etr.data.transforms import resize

_SMALLEST_CROP = 0.5
# A cropped or zoomed out object is kept if at least this much of each side is left, pixels.
_SMALLEST_BOX = 1.0


@dataclass(frozen=True)
class Shown:
    """How a step of training shows images, beside what is drawn for each.

    Attributes:
        shortest: pixels of the shorter side of ``preprocessing.exact_size`` in its batch; None: as
            configured.
        strong: whether there are photometric distortions, zoom-outs, IoU crops and mosaics.
    """

    shortest: int | None = None
    strong: bool = True


ALWAYS = Shown()
"""As configured."""


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
        strong: what comes before all this, in an image of which ``crop`` is in pixels.
    """

    size: tuple[int, int]
    crop: tuple[int, int, int, int] | None = None
    horizontal_flip: bool = False
    vertical_flip: bool = False
    jitter: tuple[float, float, float, float] | None = None
    channels: tuple[int, ...] | None = None
    inverted: bool = False
    teacher_size: tuple[int, int] | None = None
    strong: Strong = UNCHANGED

    @property
    def moves(self) -> bool:
        """Whether anything but resizing happens to where things are."""
        cut = self.crop is not None or self.strong.moves
        return cut or self.horizontal_flip or self.vertical_flip


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
    *,
    shown: Shown = ALWAYS,
    place: tuple[Sequence[ImageRecord], int] | None = None,
) -> Augmentation:
    """Draw what happens to an image.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        augmentation: what there is to draw.
        preprocessing: sizes at the end.
        generator: of this image in this epoch.
        teacher_scale: a factor on the sides that the teacher sees; it changes no draw.
        shown: what the step at hand says.
        place: the images of its split, and which it is: without them there are no zoom-outs, IoU
            crops and mosaics.
    """
    # Always the same draws in the same places: switching one transform on leaves the others'
    # as they were.
    chance = [generator.random() for _ in range(15)]
    sides, shortest = augmentation.shortest_sides, shown.shortest
    if sides is not None and preprocessing.exact_size is None:
        shortest = sides[int(chance[5] * len(sides))]
    strong = UNCHANGED
    if shown.strong and augmentation.strong:
        # A mosaic is as large as the larger of those who see it, where the smaller one resizes it.
        resizes = shortest or preprocessing.shortest_side or preprocessing.exact_size
        larger = max(1.0, teacher_scale) if resizes else 1.0
        seen = output_size(width, height, preprocessing, shortest, larger)
        scene = None if place is None else Scene(*place, seen)
        strong = draw_strong(augmentation, scene, generator)
        height, width = strong.size(height, width)
    crop = None
    if chance[0] < augmentation.crop:
        crop = _crop_window(width, height, chance[1:5])
        height, width = crop[2:]
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
        channels=CHANNEL_ORDERS[int(chance[9] * len(CHANNEL_ORDERS))] if permuted else None,
        inverted=chance[10] < augmentation.inversion,
        jitter=_jitter(augmentation.colour_jitter, chance[11:]),
        strong=strong,
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
    """[3, *plan.size] uint8 of ``pixels`` [3, h, w] uint8, which stay as they are.

    They are those of the mosaic where the plan has one.
    """
    pixels = change_pixels(pixels, plan.strong)
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
    """Where boxes [n, 4] of an image, or mosaic, of ``image_size`` (height, width) end up.

    Returns:
        [n, 4] in pixels of ``plan.size``, clipped to the image, and [n] bool: False where a
        crop left nothing of the object, or its centre out, or where it became too small.
    """
    boxes = tv_tensors.BoundingBoxes(
        torch.from_numpy(boxes_xyxy), format="XYXY", canvas_size=image_size
    )
    boxes, kept = change_boxes(boxes, plan.strong)
    if plan.crop is not None:
        boxes = functional.crop(boxes, *plan.crop)
    if plan.crop is not None or plan.strong.moves:
        kept &= _large_enough(boxes)
    boxes = functional.resize(boxes, list(plan.size))
    if plan.horizontal_flip:
        boxes = functional.horizontal_flip(boxes)
    if plan.vertical_flip:
        boxes = functional.vertical_flip(boxes)
    boxes = functional.clamp_bounding_boxes(boxes)
    if plan.strong.moves:  # a canvas that shrinks makes small objects vanish
        kept &= _large_enough(boxes)
    moved: NDArray[np.float64] = boxes.numpy()
    return moved, kept


def _large_enough(boxes: Tensor) -> NDArray[np.bool_]:
    large: NDArray[np.bool_] = ((boxes[:, 2:] - boxes[:, :2]) >= _SMALLEST_BOX).all(1).numpy()
    return large
