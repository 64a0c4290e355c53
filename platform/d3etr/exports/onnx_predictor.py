"""Detecting with an exported ONNX file in ONNX Runtime; PyTorch is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d3etr.data.preprocessing import SizeRule
from d3etr.errors import UserError
from d3etr.exports.description import INPUTS, OUTPUTS, Description
from d3etr.exports.formats import require_package
from d3etr.exports.inputs import graph_inputs, prepared
from d3etr.predictions import Found, ImagePredictor

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxPredictor(ImagePredictor):
    """An exported detector.

    Args:
        session: of ONNX Runtime.
        description: of the file.
        maximum: as of ``ImagePredictor``.

    Raises:
        UserError: the maximum is above what the file gives.
    """

    def __init__(self, session: Any, description: Description, maximum: int = 100) -> None:
        categories = [*zip(description.category_ids, description.names, strict=True)]
        super().__init__(categories, maximum, description.threshold)
        self.session, self.description = session, description

    @property
    def size_rule(self) -> SizeRule:
        """As of ``ImagePredictor``."""
        return self.description.preprocessing

    def prepared(self, image: Image.Image) -> NDArray[np.uint8]:
        """As of ``ImagePredictor``.

        Raises:
            UserError: the image would be smaller than the graph takes.
        """
        return prepared(self.description, image)

    def detect(
        self, images: Sequence[NDArray[np.uint8]], sizes: Sequence[tuple[int, int]]
    ) -> Found:
        """As of ``ImagePredictor``."""
        boxes, scores, labels = self.detect_all(images, sizes)
        most = self._maximum
        return boxes[:, :most], scores[:, :most], labels[:, :most]

    def detect_all(
        self, images: Sequence[NDArray[np.uint8]], sizes: Sequence[tuple[int, int]]
    ) -> Found:
        """As of ``detect``, all K detections that the file gives."""
        return self.run(*graph_inputs(self.description, images, sizes).values())

    def run(self, images: NDArray[Any], sizes: NDArray[np.int64]) -> Found:
        """As of ``detect_all``, of the graph's own inputs: [B, 3, h, w] and [B, 2]."""
        try:
            found = self.session.run([*OUTPUTS], dict(zip(INPUTS, (images, sizes), strict=True)))
        except Exception as error:  # the runtime has errors of many types
            count, _, height, width = images.shape
            raise UserError(
                f"ONNX Runtime failed on {count} images of {width} x {height} pixels: "
                f"{_first_line(error)}"
            ) from error
        return found[0], found[1], found[2]


def load_onnx(path: Path, device: str | None = None, threads: int | None = None) -> OnnxPredictor:
    """Open an ONNX file that ``d3etr export`` wrote.

    Args:
        path: of the file.
        device: cpu or cuda, maybe with a number; None: the first GPU that ONNX Runtime can use,
            else the CPU.
        threads: of the CPU within one operation; None: ONNX Runtime's own choice.

    Raises:
        UserError: ONNX Runtime is missing, the file is missing, damaged or not d3etr's, or there is
            no such device or it cannot be used.
    """
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"ONNX file {path} {kind}: give the path of a .onnx file")
    runtime = require_package("onnxruntime", "onnx")
    providers = _providers(runtime.get_available_providers(), device)
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads or 0
    # Else its threads go on spinning for a while and slow down what runs after it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # the runtime has errors of many types
        raise UserError(
            f"{path}: ONNX Runtime cannot read it ({_first_line(error)}). It may be truncated, or "
            "need a newer ONNX Runtime: copy it again, or export it again"
        ) from error
    if device is not None and device.startswith("cuda"):
        _require_gpu(session, device)
    metadata = session.get_modelmeta().custom_metadata_map
    return OnnxPredictor(session, Description.from_metadata(metadata, str(path)))


def _providers(available: Sequence[str], device: str | None) -> list[Any]:
    kind, _, number = (device or "").partition(":")
    if device is None:
        kind = "cuda" if _PROVIDERS["cuda"] in available else "cpu"
    provider = _PROVIDERS.get(kind)
    if provider not in available or (number and not number.isdecimal()):
        usable = [name for name, own in _PROVIDERS.items() if own in available]
        raise UserError(
            f"device '{device}' cannot be used here by ONNX Runtime: expected {' or '.join(usable)}"
        )
    if kind == "cpu":
        return [provider]
    return [(provider, {"device_id": int(number or 0)}), _PROVIDERS["cpu"]]


def _require_gpu(session: Any, device: str) -> None:
    """Refuse the CPU where a GPU was asked for: ONNX Runtime takes it without an error."""
    if _PROVIDERS["cuda"] not in session.get_providers():
        raise UserError(
            f"device '{device}': ONNX Runtime cannot load what it runs on GPUs by, and took the "
            "CPU; its lines above may say what is missing. Expected the GPU's driver, CUDA and "
            "cuDNN of the versions that onnxruntime-gpu is for: install them, or give the device "
            "'cpu'"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
