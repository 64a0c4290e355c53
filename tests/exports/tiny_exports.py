"""Tiny detectors that have learned nothing, and what they detect in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tiny import FAMILY, tiny_detector_config
from torch import Tensor

from d3etr.config.data import PreprocessingConfig
from d3etr.data.transforms import normalise
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.detectors.weights import WeightsInfo
from d3etr.evaluation.postprocess import top_detections
from d3etr.exports.comparison import Detected
from d3etr.structures import ImageBatch

CATEGORIES = ((3, "tree"), (7, "cat"), (90, "dog"))
UNSIZED = {"normalisation": "per_image", "shortest_side": None, "longest_side": None}


def untrained(kind: str, **preprocessing: Any) -> tuple[DetectionTransformer, WeightsInfo]:
    """A detector of ``tiny.FAMILY``, whose boxes and classes differ from query to query."""
    changes: dict[str, Any] = dict(FAMILY[kind])
    if changes["name"] in {"deformable_detr", "dino"}:
        changes["width"] = 32
    config = tiny_detector_config(**changes)
    torch.manual_seed(0)
    detector = build_detector(config, len(CATEGORIES)).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    info = WeightsInfo(
        detector=config,
        categories=CATEGORIES,
        preprocessing=PreprocessingConfig(**(preprocessing or UNSIZED)),
    )
    return detector, info


def noise(images: int, height: int, width: int) -> Tensor:
    """[images, 3, height, width] uint8 that are no two alike."""
    generator = torch.Generator().manual_seed(images * height + width)
    return torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def eager(
    detector: DetectionTransformer, info: WeightsInfo, pixels: Tensor, maximum: int
) -> Detected:
    """Detections in uint8 pixels [B, 3, h, w], as of images of that size."""
    normalised = torch.stack([normalise(image, info.preprocessing) for image in pixels])
    memory = detector.encode(ImageBatch(normalised))
    [outputs] = detector.decode(memory, [detector.object_queries(memory)])
    scores, labels, boxes = top_detections(outputs, sizes_of(pixels), maximum)
    return Detected(boxes.numpy(), scores.numpy(), labels.numpy())


def sizes_of(pixels: Tensor) -> list[tuple[int, int]]:
    """(height, width) of each."""
    return [(pixels.shape[2], pixels.shape[3])] * len(pixels)


def as_array(sizes: Sequence[tuple[int, int]]) -> np.ndarray[Any, Any]:
    """[B, 2] int64."""
    return np.array(sizes, dtype=np.int64)
