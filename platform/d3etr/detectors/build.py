"""Detectors from their configuration."""

from __future__ import annotations

from torch import nn

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.registry import DETECTORS


def build_detector(config: DetectorConfig, classes: int) -> DetectionTransformer:
    """Build a detector with random weights, in training mode.

    Args:
        config: architecture; ``config.name`` is a name in the registry of detectors.
        classes: C, from the data.
    """
    if classes < 1:
        raise ValueError(f"a detector needs at least one class, not {classes}")
    kind: type[DetectionTransformer] = DETECTORS.find(config.name)
    return kind(config, classes)


def count_parameters(detector: nn.Module) -> int:
    """Number of trainable and frozen parameters."""
    return sum(parameter.numel() for parameter in detector.parameters())
