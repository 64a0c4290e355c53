"""What every image goes through before a detector sees it, in training and at inference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision.transforms.v2 import functional

from d3etr.config.data import PreprocessingConfig
from d3etr.data.images import to_pixels
from d3etr.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, STD_FLOOR, output_size
from d3etr.structures import ImageBatch, Targets


@dataclass(frozen=True)
class RelativeBoxes:
    """k boxes that were found in an image.

    Attributes:
        labels: [k] in [0, C).
        boxes_cxcywh: [k, 4], relative to the image.
        scores: [k] in [0, 1].
    """

    labels: NDArray[np.int64]
    boxes_cxcywh: NDArray[np.float32]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """One image, ready to be batched, with n objects.

    Attributes:
        pixels: [3, height, width] uint8; the batch normalises them.
        labels: [n] in [0, C).
        boxes_cxcywh: [n, 4], relative to the image.
        image_id: the annotation file's id.
        original_size: (height, width) in pixels before any transform.
        teacher_pixels: [3, height', width'] uint8 that the teacher sees, where it sees others.
        labelled: whether its objects are known; else n is 0.
        of_teacher: boxes that the teacher found, where it is boxes in files.
        stored: what the teacher said, where that was stored; ``data/views.py`` makes batches of it.
    """

    pixels: Tensor
    labels: NDArray[np.int64]
    boxes_cxcywh: NDArray[np.float32]
    image_id: int
    original_size: tuple[int, int]
    teacher_pixels: Tensor | None = None
    labelled: bool = True
    of_teacher: RelativeBoxes | None = None
    stored: Mapping[str, NDArray[np.generic]] | None = None


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """[3, *size] of uint8 ``pixels`` [3, h, w]: bilinear, antialiased; ``size`` (height, width)."""
    if pixels.shape[-2:] == size:
        return pixels
    resized: Tensor = functional.resize(pixels, list(size), antialias=True)
    return resized


def normalise(pixels: Tensor, config: PreprocessingConfig, out: Tensor | None = None) -> Tensor:
    """Float32 [3, h, w] of uint8 ``pixels`` [3, h, w], by ``config.normalisation``.

    Args:
        pixels: of one image.
        config: the normalisation.
        out: where to write, of the same shape; a fresh tensor if None.
    """
    values = torch.empty(pixels.shape) if out is None else out
    values.copy_(pixels)
    if config.normalisation == "unit":
        return values.div_(255)
    if config.normalisation == "imagenet":
        mean, std = _column(IMAGENET_MEAN), _column(IMAGENET_STD)
        return values.sub_(mean * 255).div_(std * 255)
    values.sub_(values.flatten(1).mean(1)[:, None, None])
    # The norm of what is left is the deviation; var_mean takes ten times as long.
    norm = torch.linalg.vector_norm(values.flatten(1), dim=1)[:, None, None]
    return values.div_(norm / math.sqrt(values[0].numel()) + STD_FLOOR * 255)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values)[:, None, None]


def resized(image: Image.Image, config: PreprocessingConfig) -> Tensor:
    """Uint8 [3, height, width] of an RGB image in the size that a detector is shown."""
    pixels = to_pixels(image)
    height, width = pixels.shape[-2:]
    return resize(pixels, output_size(width, height, config))


def relative_cxcywh(
    boxes_xyxy: NDArray[np.float64], height: int, width: int
) -> NDArray[np.float32]:
    """Boxes [n, 4] in pixels as centre and size relative to an image of height x width."""
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    scale = np.array([width, height], dtype=np.float64)
    boxes = np.concatenate([(low + high) * (0.5 / scale), (high - low) / scale], axis=1)
    return boxes.astype(np.float32)


def collate(
    samples: Sequence[Sample],
    config: PreprocessingConfig,
    size: tuple[int, int] | None = None,
    teacher_size: tuple[int, int] | None = None,
) -> tuple[ImageBatch, Targets]:
    """Normalise images of any sizes into one batch, padded at the right and bottom.

    Args:
        samples: B of them, those with labels first.
        config: the normalisation.
        size: (height, width) to pad to; None: the largest height and the largest width.
        teacher_size: the same of the pixels that the teacher sees, where those are others.
    """
    images = _pad_images([sample.pixels for sample in samples], config, size)
    theirs = [sample.teacher_pixels for sample in samples if sample.teacher_pixels is not None]
    if theirs:
        images = replace(images, for_teacher=_pad_images(theirs, config, teacher_size))
    return images, _pad_targets(samples)


def _pad_images(
    images: Sequence[Tensor], config: PreprocessingConfig, size: tuple[int, int] | None
) -> ImageBatch:
    shapes = [(image.shape[-2], image.shape[-1]) for image in images]
    largest = (max(h for h, _ in shapes), max(w for _, w in shapes))
    height, width = size or largest
    if largest[0] > height or largest[1] > width:
        raise ValueError(f"images of up to {largest} do not fit into a batch of {size}")
    pixels = _zeros(len(images), 3, height, width)
    for place, image, (h, w) in zip(pixels, images, shapes, strict=True):
        normalise(image, config, place[:, :h, :w])
    return ImageBatch(pixels, _padding(shapes, (height, width)))


def _zeros(*shape: int) -> Tensor:
    """A float32 tensor of zeros.

    What a loading process makes lies in memory shared with the training process from the start,
    as torch's own collate function has it: it would be copied there otherwise. The system hands
    that memory out zeroed, and pages that nobody writes to cost nothing. Where it has none left,
    the tensor is not shared.
    """
    if get_worker_info() is None:
        return torch.zeros(shape)
    size = 4 * math.prod(shape)
    try:
        storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return torch.zeros(shape)
    return torch.empty(0).set_(storage).view(shape)


def _padding(shapes: Sequence[tuple[int, int]], size: tuple[int, int]) -> Tensor | None:
    if all(shape == size for shape in shapes):
        return None
    padding = torch.ones(len(shapes), *size, dtype=torch.bool)
    for rows, (height, width) in zip(padding, shapes, strict=True):
        rows[:height, :width] = False
    return padding


def _pad_targets(samples: Sequence[Sample]) -> Targets:
    counts = tuple(len(sample.labels) for sample in samples)
    known = sum(sample.labelled for sample in samples)
    if any(sample.labelled for sample in samples[known:]):
        raise ValueError("images with labels come first in a batch")
    labels = np.zeros((len(samples), max(counts)), dtype=np.int64)
    boxes = np.zeros((len(samples), max(counts), 4), dtype=np.float32)
    for index, (sample, count) in enumerate(zip(samples, counts, strict=True)):
        labels[index, :count] = sample.labels
        boxes[index, :count] = sample.boxes_cxcywh
    targets = Targets(
        labels=torch.from_numpy(labels),
        boxes_cxcywh=torch.from_numpy(boxes),
        counts=counts,
        image_ids=tuple(sample.image_id for sample in samples),
        original_sizes=tuple(sample.original_size for sample in samples),
        num_objects=torch.tensor(counts),
        labelled=None if known == len(samples) else known,
    )
    return replace(targets, of_teacher=_pad_found(samples))


def _pad_found(samples: Sequence[Sample]) -> Targets | None:
    """Boxes of a teacher in files, as targets with scores."""
    found = [sample.of_teacher for sample in samples if sample.of_teacher is not None]
    if not found:
        return None
    pairs = zip(samples, found, strict=True)
    targets = _pad_targets(
        [
            replace(s, labels=x.labels, boxes_cxcywh=x.boxes_cxcywh, of_teacher=None)
            for s, x in pairs
        ]
    )
    scores = np.zeros(targets.labels.shape, dtype=np.float32)
    for row, boxes in zip(scores, found, strict=True):
        row[: len(boxes.scores)] = boxes.scores
    return replace(targets, scores=torch.from_numpy(scores))
