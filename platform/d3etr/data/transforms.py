"""What every image goes through before a detector sees it, in training and at inference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from d3etr.config.data import PreprocessingConfig
from d3etr.data.images import load_image, to_pixels
from d3etr.structures import ImageBatch, Targets

__all__ = [
    "Sample",
    "collate",
    "load_image",
    "normalise",
    "output_size",
    "preprocess",
    "relative_cxcywh",
    "resize",
]

# Of torchvision's ImageNet weights, for pixels in [0, 1].
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
# Keeps an even channel finite; as a share of the pixel range.
_STD_FLOOR = 0.02


@dataclass(frozen=True)
class Sample:
    """One image, ready to be batched, with n objects.

    Attributes:
        pixels: [3, height, width] float32, normalised.
        labels: [n] in [0, C).
        boxes_cxcywh: [n, 4], relative to the image.
        image_id: the annotation file's id.
        original_size: (height, width) in pixels before any transform.
    """

    pixels: Tensor
    labels: NDArray[np.int64]
    boxes_cxcywh: NDArray[np.float32]
    image_id: int
    original_size: tuple[int, int]


def output_size(
    width: int, height: int, config: PreprocessingConfig, shortest: int | None = None
) -> tuple[int, int]:
    """(height, width) after resizing, by DETR's rule.

    The shorter side becomes ``shortest`` pixels (the configuration's where it is None); where
    the longer one would then pass ``config.longest_side``, that decides instead.
    """
    low, high = min(width, height), max(width, height)
    side = shortest or config.shortest_side or low
    if config.longest_side is not None and high / low * side > config.longest_side:
        side = max(1, round(config.longest_side * low / high))
    if side == low:
        return height, width
    if width < height:
        return int(side * height / width), side
    return side, int(side * width / height)


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """[3, *size] of uint8 ``pixels`` [3, h, w]: bilinear, antialiased; ``size`` (height, width)."""
    if pixels.shape[-2:] == size:
        return pixels
    resized: Tensor = functional.resize(pixels, list(size), antialias=True)
    return resized


def normalise(pixels: Tensor, config: PreprocessingConfig) -> Tensor:
    """Float32 [3, h, w] of uint8 ``pixels`` [3, h, w], as ``config.normalisation`` says."""
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    if config.normalisation == "imagenet":
        mean, std = _column(_IMAGENET_MEAN), _column(_IMAGENET_STD)
        return values.sub_(mean * 255).div_(std * 255)
    flat = values.view(3, -1)
    flat.sub_(flat.mean(1, keepdim=True))
    # The norm of what is left is the deviation; var_mean takes ten times as long.
    std = torch.linalg.vector_norm(flat, dim=1, keepdim=True) / math.sqrt(flat.shape[1])
    flat.div_(std + _STD_FLOOR * 255)
    return values


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values)[:, None, None]


def preprocess(image: Image.Image | Tensor, config: PreprocessingConfig) -> Tensor:
    """Resize and normalise an RGB image (or uint8 [3, h, w]) to float32 [3, height, width]."""
    pixels = image if isinstance(image, Tensor) else to_pixels(image)
    height, width = pixels.shape[-2:]
    return normalise(resize(pixels, output_size(width, height, config)), config)


def relative_cxcywh(
    boxes_xyxy: NDArray[np.float64], height: int, width: int
) -> NDArray[np.float32]:
    """Boxes [n, 4] in pixels as centre and size relative to an image of height x width."""
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    scale = np.array([width, height], dtype=np.float64)
    boxes = np.concatenate([(low + high) * (0.5 / scale), (high - low) / scale], axis=1)
    return boxes.astype(np.float32)


def collate(
    samples: Sequence[Sample], size: tuple[int, int] | None = None
) -> tuple[ImageBatch, Targets]:
    """Batch images of any sizes, padded at the right and bottom.

    Args:
        samples: B of them.
        size: (height, width) to pad to; None: the largest height and the largest width.
    """
    shapes = [(sample.pixels.shape[-2], sample.pixels.shape[-1]) for sample in samples]
    largest = (max(h for h, _ in shapes), max(w for _, w in shapes))
    height, width = size or largest
    if largest[0] > height or largest[1] > width:
        raise ValueError(f"images of up to {largest} do not fit into a batch of {size}")
    return _pad_images(samples, shapes, (height, width)), _pad_targets(samples)


def _pad_images(
    samples: Sequence[Sample], shapes: Sequence[tuple[int, int]], size: tuple[int, int]
) -> ImageBatch:
    if all(shape == size for shape in shapes):
        return ImageBatch(torch.stack([sample.pixels for sample in samples]))
    pixels = torch.zeros(len(samples), 3, *size)
    padding = torch.ones(len(samples), *size, dtype=torch.bool)
    for index, (sample, (height, width)) in enumerate(zip(samples, shapes, strict=True)):
        pixels[index, :, :height, :width] = sample.pixels
        padding[index, :height, :width] = False
    return ImageBatch(pixels, padding)


def _pad_targets(samples: Sequence[Sample]) -> Targets:
    counts = tuple(len(sample.labels) for sample in samples)
    labels = np.zeros((len(samples), max(counts)), dtype=np.int64)
    boxes = np.zeros((len(samples), max(counts), 4), dtype=np.float32)
    for index, (sample, count) in enumerate(zip(samples, counts, strict=True)):
        labels[index, :count] = sample.labels
        boxes[index, :count] = sample.boxes_cxcywh
    return Targets(
        labels=torch.from_numpy(labels),
        boxes_cxcywh=torch.from_numpy(boxes),
        counts=counts,
        image_ids=tuple(sample.image_id for sample in samples),
        original_sizes=tuple(sample.original_size for sample in samples),
    )
