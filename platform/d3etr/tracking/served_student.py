"""The student as MLflow loads and serves it; MLflow runs this file by its path.

Needs what detection needs (torch, torchvision, pillow) and neither Ray nor training code.
"""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray
from PIL import Image

# In a stored model, the package is an archive beside this file; elsewhere there is none.
sys.path.insert(0, str(Path(__file__).with_name("code") / "d3etr.zip"))

from d3etr.config.arguments import described
from d3etr.data.images import load_image, require_decodable_size
from d3etr.errors import UserError
from d3etr.inference import Predictor, load
from d3etr.predictions import Detections, Sample

LARGEST_BYTES = 50_000_000
"""Of an image file that a request holds, decoded from base64."""
LARGEST_BATCH = 16
"""Images that go through the detector together at most."""


def _unannotated(method: Callable[..., Any]) -> Callable[..., Any]:
    """MLflow would read annotations as the schema of a request, and warn that they are none."""
    method.__annotations__ = {}
    return method


class ServedStudent(PythonModel):  # type: ignore[misc]
    """Detects objects on images given as base64 text or arrays; whoever asks reads no files."""

    def load_context(self, context: Any) -> None:
        """Read the weights."""
        self._predictor: Predictor = load(context.artifacts["weights"])

    @_unannotated
    def predict(
        self, context: Any, model_input: Any, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One row of detections for each row of the input; a bad one fails alone.

        Images that have one size once they are resized go through the detector together.

        Args:
            context: unused.
            model_input: rows with ``image`` and optionally ``threshold`` in [0, 1]: a data
                frame, or a list of mappings. ``image`` is base64 of an image file, or an array
                [height, width, 3] of whole numbers 0..255.
            params: ``threshold`` for rows that have none.

        Returns:
            For each row boxes_xyxy (pixels), scores, labels, names, and error: null, or why
            there are no detections.
        """
        default = (params or {}).get("threshold", self._predictor.threshold)
        rows, answers = iter(_rows(model_input)), list[dict[str, Any]]()
        while some := list(islice(rows, LARGEST_BATCH)):
            answers += self._detect(some, default)
        return answers

    def _detect(self, rows: Sequence[Mapping[str, Any]], default: Any) -> list[dict[str, Any]]:
        answers: dict[int, Detections | UserError] = {}
        samples, thresholds = dict[int, Sample](), list[float]()
        for index, row in enumerate(rows):
            try:
                threshold = _threshold(row.get("threshold"), default)
                samples[index] = self._predictor.sample(_image(row.get("image")))
                thresholds.append(threshold)
            except UserError as error:
                answers[index] = error
        found = self._predictor.predict_each([*samples.values()], thresholds)
        answers |= dict(zip(samples, found, strict=True))
        return [_as_row(answers[index]) for index in range(len(rows))]


def _as_row(found: Detections | UserError) -> dict[str, Any]:
    if isinstance(found, UserError):
        return {"boxes_xyxy": [], "scores": [], "labels": [], "names": [], "error": str(found)}
    return {
        "boxes_xyxy": found.boxes_xyxy.astype(float).tolist(),
        "scores": found.scores.astype(float).tolist(),
        "labels": found.labels.tolist(),
        "names": [*found.names],
        "error": None,
    }


def _image(value: Any) -> Image.Image:
    if value is None or (isinstance(value, float) and value != value):
        raise UserError("image is missing")
    if not isinstance(value, str):
        return Image.fromarray(_pixels(value))
    encoded = value.rpartition(",")[2]
    if len(encoded) * 3 // 4 > LARGEST_BYTES:
        raise UserError(
            f"image has {len(encoded) * 0.75e-6:.1f} megabytes; expected at most "
            f"{LARGEST_BYTES / 1e6:g}"
        )
    try:
        return load_image(base64.b64decode("".join(encoded.split()), validate=True))
    except (binascii.Error, ValueError):
        raise UserError("image is not base64 text") from None


def _rows(model_input: Any) -> Iterable[Mapping[str, Any]]:
    if isinstance(model_input, Mapping):
        return [model_input]
    if hasattr(model_input, "to_dict"):  # a data frame
        rows: list[Mapping[str, Any]] = model_input.to_dict(orient="records")
        return rows
    return [row if isinstance(row, Mapping) else {"image": row} for row in model_input]


def _threshold(value: Any, default: Any) -> float:
    # A data frame has NaN where a row has none.
    given = default if value is None or (isinstance(value, float) and value != value) else value
    number = isinstance(given, Real) and not isinstance(given, bool)
    if number and 0 <= given <= 1:
        return float(given)
    raise UserError(f"threshold {described(given)} is not in [0, 1]")


def _pixels(value: Any) -> NDArray[np.uint8]:
    """[height, width, 3] of what came as numbers.

    Raises:
        UserError: another shape, or values that no 8-bit pixel has.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype.kind not in "uif":
        raise UserError(
            "image is neither base64 text nor an array [height, width, 3] with values 0..255"
        )
    require_decodable_size((array.shape[1], array.shape[0]))
    whole = array.dtype == np.uint8 or (array >= 0) & (array <= 255) & (array == np.floor(array))
    if not np.all(whole):  # NaN is none
        raise UserError(
            f"image has values from {array.min()} to {array.max()}; expected whole numbers 0..255 "
            "(255 times those in [0, 1], rounded)"
        )
    return array.astype(np.uint8)


set_model(ServedStudent())
