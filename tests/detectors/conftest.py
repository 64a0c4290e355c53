"""Detectors small enough for unit tests."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_detector_config

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.build import build_detector
from d3etr.detectors.conditional_detr import ConditionalDETR

CLASSES = 5


@pytest.fixture
def tiny_config() -> DetectorConfig:
    return tiny_detector_config(
        width=32,
        heads=4,
        encoder_layers=2,
        decoder_layers=3,
        feedforward=48,
        queries=6,
        dropout=0.1,
        box_size_bias=-1.4,
    )


@pytest.fixture
def tiny_detector(tiny_config: DetectorConfig) -> ConditionalDETR:
    """In evaluation mode, with heads that do not start at zero."""
    torch.manual_seed(0)
    detector = build_detector(tiny_config, CLASSES).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return detector
