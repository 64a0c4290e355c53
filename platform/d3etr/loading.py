"""``d3etr.load``: weights of d3etr in PyTorch, and exported detectors in their own runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from d3etr.config.arguments import require_path
from d3etr.config.urls import Url
from d3etr.errors import UserError

if TYPE_CHECKING:
    import torch

    from d3etr.inference import Predictor
    from d3etr.predictions import ImagePredictor

_OTHER_RUNTIMES = {
    ".pt2": "torch.export.load(FILE).module()",
    ".xml": "openvino.Core().compile_model(FILE)",
    ".engine": "TensorRT",
}
"""What runs exported files that are not loaded here."""

REGISTERED = "models:/"
"""Begins the address of a registered model."""


def load(weights: str | Path | Url, device: str | torch.device | None = None) -> ImagePredictor:
    """Read a weights file, or an ONNX file of ``d3etr export``, for detecting.

    An ONNX file takes neither PyTorch nor pydantic, only ONNX Runtime, NumPy and Pillow.

    Args:
        weights: a file that a run, or ``d3etr`` itself, wrote, or its URL; of ONNX a file; or a
            model of MLflow's registry, ``models:/NAME@champion`` or ``models:/NAME/VERSION``.
        device: where to run; None: the first GPU, else the CPU.

    Raises:
        UserError: the file is missing, damaged or not d3etr's, or there is no such device.
    """
    suffix = suffix_of(weights)
    if suffix in _OTHER_RUNTIMES:
        raise UserError(
            f"{weights} is for {_OTHER_RUNTIMES[suffix]}: d3etr loads its weights files "
            "(.safetensors) and ONNX files"
        )
    if suffix == ".onnx":
        from d3etr.exports.onnx_predictor import load_onnx

        if device is not None and not isinstance(device, str):
            device = str(device)
        return load_onnx(require_path("weights", weights), device)
    return load_weights_file(weights, device)


def load_weights_file(
    weights: str | Path | Url, device: str | torch.device | None = None
) -> Predictor:
    """As ``load``, of weights alone: a detector in PyTorch."""
    from d3etr import inference

    with weights_place(weights) as place:
        return inference.load(place, device)


@contextmanager
def weights_place(weights: str | Path | Url) -> Iterator[str | Path | Url]:
    """Where weights are read: a registered model's are fetched for the block.

    Raises:
        UserError: MLflow does not have them.
    """
    if not is_registered(weights):
        yield weights
        return
    from d3etr.tracking.registry import registered_weights

    with registered_weights(str(weights)) as file:
        yield file


def is_registered(weights: object) -> bool:
    """Whether it names a model of MLflow's registry."""
    return isinstance(weights, str | Path) and str(weights).startswith(REGISTERED)


def suffix_of(weights: object) -> str:
    """Of a path or URL; empty for anything else."""
    if is_registered(weights):  # its name may have a dot
        return ""
    if isinstance(weights, Url):
        return weights.path.suffix.lower()
    if isinstance(weights, str | os.PathLike):
        return Path(os.fsdecode(weights)).suffix.lower()
    return ""


def is_onnx(weights: object) -> bool:
    """Whether it names an ONNX file."""
    return suffix_of(weights) == ".onnx"
