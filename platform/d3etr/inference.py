"""Detecting objects with a weights file, on pictures of any size."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from d3etr.config.arguments import (
    described,
    require_location,
    require_number,
    require_path,
    require_whole,
)
from d3etr.config.location import Url
from d3etr.data.images import load_image, upright_rgb
from d3etr.data.transforms import normalise, resized
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.weights import WeightsInfo, load_weights
from d3etr.errors import UserError
from d3etr.evaluation.postprocess import top_detections
from d3etr.storage.fetch import local_file
from d3etr.structures import ImageBatch

ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
"""A file, a PIL image, or RGB pixels [height, width, 3] of 0 to 255."""
LARGEST_BATCH = 4096

_Sample = tuple[Tensor, tuple[int, int]]
"""An image as the detector is shown it, uint8 [3, h, w], and its (height, width) as given."""


@dataclass(frozen=True)
class Detections:
    """What was found on one image: K objects, most certain first.

    Raises UserError if the four do not have K entries each.

    Attributes:
        boxes_xyxy: [K, 4] float32, pixels of the image as given, within its borders.
        scores: [K] float32 in [0, 1].
        labels: [K] int64, category ids of the annotation file that the detector learnt from.
        names: K category names.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.names)
        expected = {"boxes_xyxy": (count, 4), "scores": (count,), "labels": (count,)}
        for name, shape in expected.items():
            if np.shape(getattr(self, name)) != shape:
                found = described(getattr(self, name))
                raise UserError(f"{name} is {found}; {count} names need an array {list(shape)}")

    def __len__(self) -> int:
        return len(self.names)

    def as_dicts(self) -> list[dict[str, Any]]:
        """One plain mapping an object: name, label, score, box_xyxy."""
        columns = zip(self.names, self.labels, self.scores, self.boxes_xyxy, strict=True)
        return [
            {
                "name": name,
                "label": int(label),
                "score": round(float(score), 4),
                "box_xyxy": [round(float(side), 1) for side in box],
            }
            for name, label, score, box in columns
        ]


class Predictor:
    """A detector with what it takes to use it: classes, preprocessing, device.

    Args:
        detector: in evaluation mode, on ``device``.
        info: the metadata of its weights file.
        device: where it runs.
        maximum: detections per image at most.

    Raises:
        UserError: an argument of another type.
    """

    def __init__(
        self,
        detector: DetectionTransformer,
        info: WeightsInfo,
        device: torch.device,
        maximum: int = 100,
    ) -> None:
        if not isinstance(detector, DetectionTransformer) or not isinstance(info, WeightsInfo):
            raise UserError(
                f"a Predictor of {described(detector)} and {described(info)}; expected a detector "
                "and its WeightsInfo: d3etr.load(WEIGHTS) makes a Predictor"
            )
        self.detector = detector
        self.info = info
        self.device = device
        self._maximum = require_whole("maximum", maximum, 1, 10_000)
        self._ids = np.array([category for category, _ in info.categories], dtype=np.int64)
        self._names = tuple(name for _, name in info.categories)

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        threshold: float | None = None,
        batch_size: int = 8,
    ) -> list[Detections]:
        """Detect objects.

        Args:
            images: one image or several; a generator is read as detection proceeds.
            threshold: lowest score of a detection, in [0, 1]; None: that of the weights, which had
                the highest F1 on validation, or 0.5 where they carry none.
            batch_size: images that go through the detector together.

        Returns:
            Detections of each image, in the order given.

        Raises:
            UserError: something that is no image or cannot be read, or a number out of range.
        """
        threshold = self.info.threshold if threshold is None else threshold
        threshold = require_number("threshold", threshold, 0, 1)
        batch_size = require_whole("batch_size", batch_size, 1, LARGEST_BATCH)
        samples = self._samples(images)
        found: list[Detections] = []
        while some := list(islice(samples, batch_size)):
            found += self._predict_some(some, threshold)
        return found

    def _samples(self, images: ImageLike | Iterable[ImageLike]) -> Iterator[_Sample]:
        if _is_single(images):
            yield self._sample(cast("ImageLike", images))
            return
        for index, image in enumerate(cast("Iterable[ImageLike]", images)):
            try:
                yield self._sample(image)
            except UserError as error:
                raise UserError(f"image {index} of those given (from 0): {error}") from error

    def _sample(self, image: ImageLike) -> _Sample:
        rgb = read_image(image)
        return resized(rgb, self.info.preprocessing), (rgb.height, rgb.width)

    def _predict_some(self, samples: Sequence[_Sample], threshold: float) -> list[Detections]:
        """Detections of a few images; those of one size go through the detector together.

        Padding is avoided because it reaches group normalisation's statistics: an image's
        detections would depend on its neighbours.
        """
        by_size: dict[torch.Size, list[int]] = {}
        for index, (pixels, _) in enumerate(samples):
            by_size.setdefault(pixels.shape, []).append(index)
        found: dict[int, Detections] = {}
        for indices in by_size.values():
            batch = [samples[index] for index in indices]
            found.update(zip(indices, self._predict_batch(batch, threshold), strict=True))
        return [found[index] for index in range(len(samples))]

    @torch.inference_mode()
    def _predict_batch(self, samples: Sequence[_Sample], threshold: float) -> Iterator[Detections]:
        sizes = [size for _, size in samples]
        pixels = torch.stack([normalise(image, self.info.preprocessing) for image, _ in samples])
        with _memory_as_user_error(pixels.shape):
            memory = self.detector.encode(ImageBatch(pixels.to(self.device)))
            [outputs] = self.detector.decode(memory, [self.detector.object_queries(memory)])
        columns = (column.cpu() for column in top_detections(outputs, sizes, self._maximum))
        for scores, labels, boxes, (height, width) in zip(*columns, sizes, strict=True):
            kept = scores >= threshold
            limits = boxes.new_tensor([width, height, width, height])
            indices = labels[kept].numpy()
            yield Detections(
                boxes_xyxy=boxes[kept].clamp(min=0).minimum(limits).float().numpy(),
                scores=scores[kept].float().numpy(),
                labels=self._ids[indices],
                names=tuple(self._names[index] for index in indices),
            )


@contextmanager
def _memory_as_user_error(shape: Sequence[int]) -> Iterator[None]:
    """What a detector needs grows with the square of an image's area."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "can't allocate memory" not in str(error):
            raise
        images, _, height, width = shape
        raise UserError(
            f"there is too little memory for {images} images of {width} x {height} pixels at "
            "once: give a smaller batch_size, smaller images or tiles of them"
        ) from error


def load(weights: str | Path | Url, device: str | torch.device | None = None) -> Predictor:
    """Read a weights file for detecting.

    Args:
        weights: a file that a run, or ``d3etr`` itself, wrote, or its URL.
        device: where to run; None: the first GPU, else the CPU.

    Raises:
        UserError: the file is missing, damaged or not d3etr's, or there is no such device.
    """
    location = require_location("weights", weights)
    chosen = usable_device(device)
    with local_file(location) as file:
        detector, info = load_weights(file)
    return Predictor(detector.to(chosen), info, chosen)


def read_image(image: ImageLike) -> Image.Image:
    """An image as upright 8-bit RGB.

    Raises:
        UserError: a file that cannot be read, or something that is no RGB image.
    """
    if isinstance(image, str | os.PathLike):
        return load_image(require_path("image", image))
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size:
        if image.ndim == 3 and image.shape[2] == 3:
            return Image.fromarray(np.asarray(image))
    raise UserError(
        f"{described(image)} is no image; expected [height, width, 3] of uint8, in the order red, "
        "green, blue, a PIL image, or a file's path"
    )


def _is_single(images: object) -> bool:
    """Whether this is one image, or nothing that several could be taken from."""
    single = (str, os.PathLike, Image.Image, bytes, bytearray, memoryview, Mapping)
    array_or_file = hasattr(images, "shape") or hasattr(images, "read")
    return array_or_file or isinstance(images, single) or not isinstance(images, Iterable)


def _from_pil(image: Image.Image) -> Image.Image:
    try:
        return upright_rgb(image)
    except UserError as error:
        raise UserError(f"a PIL image of mode {image.mode}: {error}") from error
    except Exception as error:  # it is decoded here, if it was opened only
        raise UserError(f"a PIL image of mode {image.mode} cannot be decoded ({error})") from error


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None: the first GPU, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, str | torch.device):
        raise UserError(f"device is {described(device)}; expected a name such as 'cpu' or 'cuda:0'")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).cpu()
    except Exception as error:  # every backend of torch has its own types
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"device '{device}' cannot be used here: {first_line}") from error
    return chosen
