"""Every detector by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.conditional_detr import ConditionalDETR
from d3etr.detectors.dab_detr import DABDETR
from d3etr.detectors.deformable_detr import DeformableDETR
from d3etr.detectors.detr import DETR

DETECTORS: Mapping[str, Callable[[DetectorConfig, int], DetectionTransformer]] = MappingProxyType(
    {
        "detr": DETR,
        "conditional_detr": ConditionalDETR,
        "dab_detr": DABDETR,
        "deformable_detr": DeformableDETR,
    }
)


def build_detector(config: DetectorConfig, classes: int) -> DetectionTransformer:
    """Build a detector with random weights, in training mode.

    Args:
        config: architecture; ``config.name`` is a key of ``DETECTORS``.
        classes: C, from the data.
    """
    if classes < 1:
        raise ValueError(f"a detector needs at least one class, not {classes}")
    return DETECTORS[config.name](config, classes)


def count_parameters(detector: nn.Module) -> int:
    """Number of trainable and frozen parameters."""
    return sum(parameter.numel() for parameter in detector.parameters())
