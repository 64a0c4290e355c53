"""Detectors that are small enough for unit tests."""

from __future__ import annotations

from typing import Any

from d3etr.config.detector import DetectorConfig


def tiny_detector_config(**changes: Any) -> DetectorConfig:
    """A Conditional DETR of 16 channels; keyword arguments change its architecture."""
    settings: dict[str, Any] = {
        "backbone": {"name": "small", "stem_width": 8, "stage_widths": (8, 8, 16)},
        "width": 16,
        "heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "feedforward": 16,
        "queries": 5,
        "dropout": 0.0,
    }
    return DetectorConfig.model_validate(settings | changes)
