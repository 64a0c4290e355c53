"""Detecting objects with a weights file, on pictures of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from d3etr.config.arguments import described, require_location
from d3etr.config.data import PreprocessingConfig
from d3etr.config.location import Url
from d3etr.data.transforms import normalise, resized
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.weights import WeightsInfo, load_weights
from d3etr.errors import UserError
from d3etr.evaluation.postprocess import top_detections
from d3etr.predictions import Detections, Found, ImageLike, ImagePredictor, read_image
from d3etr.storage.fetch import local_file
from d3etr.structures import ImageBatch

__all__ = ["Detections", "ImageLike", "Predictor", "load", "read_image", "usable_device"]


class Predictor(ImagePredictor):
    """A detector with what it takes to use it: classes, preprocessing, device.

    Args:
        detector: in evaluation mode, on ``device``.
        info: the metadata of its weights file.
        device: where it runs.
        maximum: as of ``ImagePredictor``.

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
        super().__init__(info.categories, maximum, info.threshold)
        self.detector = detector
        self.info = info
        self.device = device

    @property
    def size_rule(self) -> PreprocessingConfig:
        """As of ``ImagePredictor``."""
        return self.info.preprocessing

    def prepared(self, image: Image.Image) -> Tensor:
        """As of ``ImagePredictor``."""
        return resized(image, self.info.preprocessing)

    @torch.inference_mode()
    def detect(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Found:
        """As of ``ImagePredictor``."""
        pixels = torch.stack([normalise(image, self.info.preprocessing) for image in images])
        with _memory_as_user_error(pixels.shape):
            memory = self.detector.encode(ImageBatch(pixels.to(self.device)))
            [outputs] = self.detector.decode(memory, [self.detector.object_queries(memory)])
        scores, labels, boxes = (x.cpu() for x in top_detections(outputs, sizes, self._maximum))
        return boxes.numpy(), scores.float().numpy(), labels.numpy()


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
