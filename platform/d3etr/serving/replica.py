"""A process that holds the model: pictures in, detections out, several in one pass."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ray import serve

from d3etr.data.images import LIMIT_VARIABLE, decoding_problem, load_image, open_image
from d3etr.errors import UserError
from d3etr.predictions import Detections, ImagePredictor, Sample
from d3etr.serving.answers import BAD_REQUEST, TOO_LARGE, Answer, RefusedError, refusal
from d3etr.serving.settings import ServeSettings

PROBLEM = "model cannot be served: "
"""Begins the line, followed by JSON text, that Ray reports of a model that cannot be loaded."""
_WARM_UP = (480, 640)
"""Height and width of the picture that a replica detects on before it takes requests."""


@dataclass(frozen=True)
class Request:
    """A picture that waits for its turn.

    Attributes:
        sample: as the detector is shown it.
        threshold: lowest score of a detection.
    """

    sample: Sample
    threshold: float


class Replica:
    """A detector behind Ray Serve; ready once it has detected.

    Args:
        settings: of the service.
    """

    def __init__(self, settings: ServeSettings) -> None:
        os.environ[LIMIT_VARIABLE] = str(settings.max_megapixels)
        if settings.tracking_uri is not None:
            os.environ["MLFLOW_TRACKING_URI"] = settings.tracking_uri
        self._settings = settings
        try:
            self._predictor = load_model(settings)
            self._predictor.predict(np.zeros((*_WARM_UP, 3), dtype=np.uint8))
        except UserError as error:
            raise RuntimeError(PROBLEM + json.dumps(str(error))) from None
        self._together = serve.batch(
            max_batch_size=settings.max_batch,
            batch_wait_timeout_s=settings.batch_wait_ms / 1000,
        )(self._detect)

    async def detect(self, picture: bytes, threshold: float | None) -> Answer:
        """Answer one request.

        A picture is decoded before it meets others, so that a bad one fails alone.

        Args:
            picture: an image file's content.
            threshold: lowest score of a detection; None: the service's.
        """
        try:
            sample = await asyncio.to_thread(self._sample, picture)
        except RefusedError as refused:
            return refused.answer
        lowest = self._threshold if threshold is None else threshold
        found = await self._together(Request(sample, lowest))
        if isinstance(found, UserError):
            return refusal(BAD_REQUEST, found)
        height, width = sample[1]
        return Answer(200, {"width": width, "height": height, "detections": found.as_dicts()})

    def about(self) -> dict[str, object]:
        """The model: its classes, and the threshold of requests that give none."""
        return {"classes": [*self._predictor.names], "threshold": self._threshold}

    @property
    def _threshold(self) -> float:
        given = self._settings.threshold
        return self._predictor.threshold if given is None else given

    def _sample(self, picture: bytes) -> Sample:
        try:
            _require_few_pixels(picture, self._settings.max_megapixels)
            return self._predictor.sample(load_image(picture))
        except UserError as error:
            raise RefusedError(BAD_REQUEST, error) from error

    async def _detect(self, requests: Sequence[Request]) -> list[Detections | UserError]:
        samples = [request.sample for request in requests]
        thresholds = [request.threshold for request in requests]
        # In a thread: the next batch is decoded and gathered meanwhile.
        return await asyncio.to_thread(self._predictor.predict_each, samples, thresholds)


def load_model(settings: ServeSettings) -> ImagePredictor:
    """The model of a service, with the threads and the device of a replica.

    Raises:
        UserError: it cannot be loaded.
    """
    from d3etr.config.arguments import require_path
    from d3etr.loading import is_onnx, load

    threads = max(1, round(settings.cpus))
    device = "cuda" if settings.gpus else "cpu"
    if is_onnx(settings.model):
        from d3etr.exports.onnx_predictor import load_onnx

        return load_onnx(require_path("model", settings.model), device, threads)
    import torch

    torch.set_num_threads(threads)
    return load(settings.model, device)


def _require_few_pixels(picture: bytes, most: float) -> None:
    """Refuse a picture by its header, before its pixels are decoded."""
    try:
        with open_image(picture) as header:
            width, height = header.size
    except Exception as error:  # damaged bytes lead decoders to errors of any type
        raise UserError(f"the body is no picture: {decoding_problem(error)}") from error
    if width * height > most * 1e6:
        raise RefusedError(
            TOO_LARGE,
            f"the picture has {width} x {height} pixels, {width * height / 1e6:.1f} megapixels; "
            f"expected at most {most:g}: make it smaller, or send tiles of it",
        )
