"""Detecting objects with a weights file, on pictures of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from d3etr.config.location import Url, named_location
from d3etr.data.images import load_image, to_rgb
from d3etr.data.transforms import Sample, collate, resized
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.postprocess import top_detections
from d3etr.detectors.weights import WeightsInfo, load_weights
from d3etr.errors import UserError
from d3etr.storage.fetch import local_file

ImageLike: TypeAlias = str | Path | Image.Image | NDArray[np.uint8]
"""A file, a PIL image, or RGB pixels [height, width, 3]."""


@dataclass(frozen=True)
class Detections:
    """What was found on one image: K objects, most certain first.

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
        info: what its weights file says.
        device: where it runs.
        maximum: detections per image at most.
    """

    def __init__(
        self,
        detector: DetectionTransformer,
        info: WeightsInfo,
        device: torch.device,
        maximum: int = 100,
    ) -> None:
        self.detector = detector
        self.info = info
        self.device = device
        self._maximum = maximum
        self._ids = np.array([category for category, _ in info.categories], dtype=np.int64)
        self._names = tuple(name for _, name in info.categories)

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        threshold: float = 0.5,
        batch_size: int = 8,
    ) -> list[Detections]:
        """Detect objects.

        Args:
            images: one image or several.
            threshold: lowest score of a detection, in [0, 1].
            batch_size: images that go through the detector together.

        Returns:
            Detections of each image, in the order given.

        Raises:
            UserError: an image cannot be read, or a number is out of range.
        """
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold is {threshold}; expected a number from 0 to 1")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; expected at least 1")
        alone = isinstance(images, str | Path | Image.Image | np.ndarray)
        several = cast("Sequence[ImageLike]", [images] if alone else images)
        found: list[Detections] = []
        for start in range(0, len(several), batch_size):
            found += self._predict_some(several[start : start + batch_size], threshold)
        return found

    def _predict_some(self, images: Sequence[ImageLike], threshold: float) -> list[Detections]:
        """Detections of a few images; those of one size go through the detector together.

        Padding is avoided because it reaches group normalisation's statistics: an image's
        detections would depend on its neighbours.
        """
        samples = [self._sample(image) for image in images]
        by_size: dict[torch.Size, list[int]] = {}
        for index, sample in enumerate(samples):
            by_size.setdefault(sample.pixels.shape, []).append(index)
        found: dict[int, Detections] = {}
        for indices in by_size.values():
            batch = [samples[index] for index in indices]
            found.update(zip(indices, self._predict_batch(batch, threshold), strict=True))
        return [found[index] for index in range(len(images))]

    @torch.inference_mode()
    def _predict_batch(self, samples: Sequence[Sample], threshold: float) -> list[Detections]:
        batch, targets = collate(samples, self.info.preprocessing)
        memory = self.detector.encode(batch.to(self.device))
        [outputs] = self.detector.decode(memory, [self.detector.object_queries(memory)])
        sizes = targets.original_sizes
        columns = top_detections(outputs, sizes, self._maximum)
        images = zip(*(column.cpu() for column in columns), sizes, strict=True)
        return [
            self._detections(scores, labels, boxes, size, threshold)
            for scores, labels, boxes, size in images
        ]

    def _sample(self, image: ImageLike) -> Sample:
        rgb = read_image(image)
        return Sample(
            pixels=resized(rgb, self.info.preprocessing),
            labels=np.zeros(0, dtype=np.int64),
            boxes_cxcywh=np.zeros((0, 4), dtype=np.float32),
            image_id=0,
            original_size=(rgb.height, rgb.width),
        )

    def _detections(
        self,
        scores: Tensor,
        labels: Tensor,
        boxes: Tensor,
        size: tuple[int, int],
        threshold: float,
    ) -> Detections:
        kept = scores >= threshold
        height, width = size
        limits = boxes.new_tensor([width, height, width, height])
        indices = labels[kept].numpy()
        return Detections(
            boxes_xyxy=boxes[kept].clamp(min=0).minimum(limits).float().numpy(),
            scores=scores[kept].float().numpy(),
            labels=self._ids[indices],
            names=tuple(self._names[index] for index in indices),
        )


def load(weights: str | Path | Url, device: str | torch.device | None = None) -> Predictor:
    """Read a weights file for detecting.

    Args:
        weights: a file that a run, or ``d3etr`` itself, wrote, or its URL.
        device: where to run; None: the first GPU, else the CPU.

    Raises:
        UserError: the file is missing, damaged or not d3etr's, or there is no such device.
    """
    location = weights if isinstance(weights, Url | Path) else named_location(weights)
    with local_file(location) as file:
        detector, info = load_weights(file)
    chosen = usable_device(device)
    return Predictor(detector.to(chosen), info, chosen)


def read_image(image: ImageLike) -> Image.Image:
    """An image as upright 8-bit RGB.

    Raises:
        UserError: a file that cannot be read, or an array that is no RGB image.
    """
    if isinstance(image, str | Path):
        return load_image(Path(image))
    if isinstance(image, Image.Image):
        return _to_upright_rgb(image)
    if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8:
        return Image.fromarray(image)
    raise UserError(
        f"an array {list(image.shape)} of {image.dtype} is no image; "
        "expected [height, width, 3] of uint8, in the order red, green, blue"
    )


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    try:
        return to_rgb(ImageOps.exif_transpose(image))
    except (ValueError, OSError) as error:
        raise UserError(f"a PIL image of mode {image.mode} cannot be used: {error}") from error


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None: the first GPU, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"device '{device}' cannot be used here: {first_line}") from error
    return chosen
