"""A detector in one safetensors file: weights, architecture, classes, preprocessing, origin.

Nothing in such a file is executed when it is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from d3etr.config.base import Section
from d3etr.config.data import PreprocessingConfig
from d3etr.config.detector import AnyDetector
from d3etr.config.problems import ConfigError, problems_of
from d3etr.config.renamed import with_current_keys
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.detectors.tensor_files import (
    ensure_fit,
    file_digest,
    load_strictly,
    read_metadata,
    read_tensors,
    write_tensors,
)
from d3etr.errors import UserError

__all__ = ["WeightsInfo", "file_digest", "load_weights", "read_info", "save_weights"]

FORMAT_KEY = "d3etr_format"
INFO_KEY = "d3etr_info"
FORMAT = "1"


CategoryId = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class WeightsInfo(Section):
    """What a weights file says beside its tensors."""

    detector: AnyDetector
    categories: Annotated[tuple[tuple[CategoryId, str], ...], Field(min_length=1)]
    """(id of the annotation file, name) of each class, in the order of the logits."""
    preprocessing: PreprocessingConfig
    evaluation: dict[str, Any] | None = None
    """Split, data digest, mAP and whatever else its evaluation recorded."""
    origin: Annotated[dict[str, Any], Field(default_factory=dict)]
    """How the weights came about: run, seed, steps, versions."""


def save_weights(
    path: Path, detector: DetectionTransformer, info: WeightsInfo, dtype: torch.dtype | None = None
) -> None:
    """Write a detector, whole or not at all.

    Args:
        path: where to; its folder is made.
        detector: whose state is written.
        info: must describe ``detector``.
        dtype: store matrices and kernels like this, for example ``torch.float16`` to halve a
            file that is shipped; vectors (biases, norms) stay as they are. None: all as it is.
    """
    if len(info.categories) != detector.classes or info.detector != detector.config:
        raise ValueError("info does not describe this detector")
    tensors = {name: _stored(name, x, dtype) for name, x in detector.state_dict().items()}
    write_tensors(path, tensors, {FORMAT_KEY: FORMAT, INFO_KEY: info.model_dump_json()})


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point() or tensor.dim() < 2:
        return tensor
    stored = tensor.to(dtype)
    if not stored.isfinite().all():
        raise UserError(f"tensor {name} has values that {dtype} can't hold: save it as float32")
    return stored


def read_info(path: Path) -> WeightsInfo:
    """What a weights file says about itself, without reading its tensors.

    Raises:
        UserError: not a d3etr weights file, or one of another format version.
    """
    metadata = read_metadata(path)
    if INFO_KEY not in metadata:
        raise UserError(
            f"{path}: a safetensors file, but not one of d3etr's: its metadata has no "
            f"'{INFO_KEY}'. Expected a file that a run of d3etr wrote (weights.safetensors)."
        )
    if metadata.get(FORMAT_KEY) != FORMAT:
        raise UserError(
            f"{path}: format version {metadata.get(FORMAT_KEY)}, but this d3etr reads version "
            f"{FORMAT}: use the d3etr that wrote it, or write it again with this one."
        )
    try:
        return WeightsInfo.model_validate_json(_with_current_keys(metadata[INFO_KEY]))
    except ValidationError as error:
        problems = problems_of(error, WeightsInfo)
        raise ConfigError(f"{path}, whose '{INFO_KEY}' metadata is broken", problems) from error


def _with_current_keys(text: str) -> str:
    """The JSON of a file that an earlier version wrote, with today's keys."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return text  # whoever validates it says what is wrong
    sections = {"detector": "student.detector", "preprocessing": "data.preprocessing"}
    for name, path in sections.items():
        if isinstance(tree, dict) and isinstance(tree.get(name), dict):
            tree[name], _ = with_current_keys(tree[name], path, warn=False)
    return json.dumps(tree)


def load_weights(path: Path) -> tuple[DetectionTransformer, WeightsInfo]:
    """Build the detector of a weights file.

    Args:
        path: a file that ``save_weights`` wrote, in any storage type.

    Returns:
        The detector in evaluation mode, float32 on the CPU, and what the file says about it.

    Raises:
        UserError: missing, truncated or foreign file, or tensors that do not fit.
    """
    info = read_info(path)
    tensors = read_tensors(path)
    with torch.device("meta"):  # what the file says of itself may be larger than this machine
        expected = build_detector(info.detector, len(info.categories)).state_dict()
    ensure_fit(expected, tensors, str(path))
    detector = build_detector(info.detector, len(info.categories))
    load_strictly(detector, tensors, str(path))
    return detector.eval(), info
