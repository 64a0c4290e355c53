"""Every detector by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.conditional_detr import ConditionalDETR

DETECTORS: Mapping[str, Callable[[DetectorConfig, int], ConditionalDETR]] = MappingProxyType(
    {"conditional_detr": ConditionalDETR}
)


def build_detector(config: DetectorConfig, classes: int) -> ConditionalDETR:
    """Build a detector with random weights, in training mode.

    Args:
        config: architecture; ``config.name`` is a key of ``DETECTORS``.
        classes: C, from the data.
    """
    if classes < 1:
        raise ValueError(f"a detector needs at least one class, not {classes}")
    return DETECTORS[config.name](config, classes)


def count_parameters(detector: ConditionalDETR) -> int:
    """Number of trainable and frozen parameters."""
    return sum(parameter.numel() for parameter in detector.parameters())
