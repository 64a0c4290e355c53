"""Detectors small enough for unit tests."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILY, tiny_detector_config

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector

CLASSES = 5
SIZES = {
    "width": 32,
    "heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "feedforward": 48,
    "queries": 6,
    "dropout": 0.1,
    "box_size_bias": -1.4,
}


def _detector(config: DetectorConfig) -> DetectionTransformer:
    """In evaluation mode, with heads that do not start at zero."""
    torch.manual_seed(0)
    detector = build_detector(config, CLASSES).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return detector


@pytest.fixture
def family() -> dict[str, dict[str, object]]:
    """What tells the detectors of the family apart, by name of the variant."""
    return FAMILY


@pytest.fixture
def tiny_config() -> DetectorConfig:
    """A Conditional DETR's."""
    return tiny_detector_config(**SIZES)


@pytest.fixture(params=FAMILY)
def tiny_detector(request: pytest.FixtureRequest) -> DetectionTransformer:
    """One detector of each kind."""
    return _detector(tiny_detector_config(**(SIZES | FAMILY[request.param])))


@pytest.fixture
def conditional_detr(tiny_config: DetectorConfig) -> DetectionTransformer:
    """A Conditional DETR."""
    return _detector(tiny_config)
