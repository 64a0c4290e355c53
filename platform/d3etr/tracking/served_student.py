"""The student as MLflow loads and serves it; MLflow runs this file by its path.

Needs what detection needs (torch, torchvision, pillow) and neither Ray nor training code.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from PIL import Image

from d3etr.inference import Predictor, load
from d3etr.tracking.model import ALLOW_PATHS, DEFAULT_THRESHOLD


def _unannotated(method: Callable[..., Any]) -> Callable[..., Any]:
    """MLflow would read annotations as the schema of a request, and warn that they are none."""
    method.__annotations__ = {}
    return method


class ServedStudent(PythonModel):  # type: ignore[misc]
    """Detects objects on images given as base64 text, arrays or, where allowed, paths."""

    def load_context(self, context: Any) -> None:
        """Read the weights."""
        self._predictor: Predictor = load(context.artifacts["weights"])
        self._allow_paths = bool((context.model_config or {}).get(ALLOW_PATHS, False))

    @_unannotated
    def predict(
        self, context: Any, model_input: Any, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One row of detections for each row of the input.

        Args:
            context: unused.
            model_input: rows with ``image`` and optionally ``threshold`` in [0, 1]: a data
                frame, or a list of mappings. ``image`` is base64 of an image file, an array
                [height, width, 3] of 0..255, or a path.
            params: ``threshold`` for rows that have none.

        Returns:
            For each row boxes_xyxy (pixels), scores, labels, names, and error: null, or why
            there are no detections.
        """
        default = float((params or {}).get("threshold", DEFAULT_THRESHOLD))
        return [self._detect(row, default) for row in _rows(model_input)]

    def _detect(self, row: Mapping[str, Any], default: float) -> dict[str, Any]:
        try:
            image = _read_image(row.get("image"), self._allow_paths)
            threshold = _threshold(row.get("threshold"), default)
            [found] = self._predictor.predict([image], threshold=threshold)
        except _BadInputError as error:
            return _answer(error=str(error))
        return _answer(
            boxes_xyxy=np.asarray(found.boxes_xyxy, dtype=float).reshape(-1, 4).tolist(),
            scores=np.asarray(found.scores, dtype=float).tolist(),
            labels=np.asarray(found.labels, dtype=int).tolist(),
            names=list(found.names),
        )


class _BadInputError(ValueError):
    """What the caller sent cannot be used."""


def _answer(
    boxes_xyxy: list[list[float]] | None = None,
    scores: list[float] | None = None,
    labels: list[int] | None = None,
    names: list[str] | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    return {
        "boxes_xyxy": boxes_xyxy or [],
        "scores": scores or [],
        "labels": labels or [],
        "names": names or [],
        "error": error,
    }


def _rows(model_input: Any) -> Iterable[Mapping[str, Any]]:
    if hasattr(model_input, "to_dict"):  # a data frame
        rows: list[Mapping[str, Any]] = model_input.to_dict(orient="records")
        return rows
    return [row if isinstance(row, Mapping) else {"image": row} for row in model_input]


def _threshold(value: Any, default: float) -> float:
    if value is None or value != value:  # a data frame says NaN where a row has none
        return default
    if not 0 <= float(value) <= 1:
        raise _BadInputError(f"threshold {value} is not in [0, 1]")
    return float(value)


def _read_image(value: Any, allow_paths: bool) -> Image.Image:
    if isinstance(value, str):
        return _image_from_text(value, allow_paths)
    try:
        array = np.asarray(value)
        if array.ndim == 3 and array.shape[2] == 3:
            return Image.fromarray(array.astype(np.uint8))
    except (TypeError, ValueError):
        pass
    raise _BadInputError(
        "image is neither base64 text nor an array [height, width, 3] with values 0..255"
    )


def _image_from_text(text: str, allow_paths: bool) -> Image.Image:
    try:
        source: Any = io.BytesIO(base64.b64decode(text.rpartition(",")[2], validate=True))
    except (binascii.Error, ValueError):
        if not allow_paths:
            raise _BadInputError(
                "image is not base64 text. (Paths are read only if the model was loaded with "
                f"model_config={{'{ALLOW_PATHS}': True}}.)"
            ) from None
        source = text
    try:
        with Image.open(source) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _BadInputError(f"image cannot be decoded: {error}") from error


set_model(ServedStudent())
