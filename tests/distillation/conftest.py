"""Tiny detectors and batches for the core's tests."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tiny import FAMILY, REPRESENTATIVES, tiny_detector_config
from torch import nn

from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.structures import ImageBatch, Targets

CLASSES = 3


def _tiny(seed: int = 0, classes: int = CLASSES, **changes: object) -> DetectionTransformer:
    torch.manual_seed(seed)
    wider = {"width": 32, "heads": 4, "feedforward": 32, "queries": 6}
    config = tiny_detector_config(**(wider | changes))
    detector = build_detector(config, classes)
    _spread(detector)
    return detector.eval()


def _spread(detector: nn.Module) -> None:
    """Random heads, so that boxes and classes of different queries differ."""
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if "head" in name or "anchors" in name:
                parameter.normal_(std=0.2)
            elif name.endswith(("offsets.weight", "attention.weights.weight")):
                parameter.normal_(std=0.2)  # of deformable attention: they start at zero


@pytest.fixture
def tiny_detector() -> Callable[..., DetectionTransformer]:
    """Build a small random Conditional DETR; keyword arguments change its architecture."""
    return _tiny


@pytest.fixture(params=FAMILY)
def any_detector(request: pytest.FixtureRequest) -> Callable[..., DetectionTransformer]:
    """The same for each detector of the family."""
    return partial(_tiny, **FAMILY[request.param])


@pytest.fixture(params=REPRESENTATIVES)
def some_detector(request: pytest.FixtureRequest) -> Callable[..., DetectionTransformer]:
    """The same for a few that stand for the others."""
    return partial(_tiny, **FAMILY[request.param])


@pytest.fixture
def images() -> ImageBatch:
    """Three images, two of them padded."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(3, 3, 32, 40, generator=generator)
    padding = torch.zeros(3, 32, 40, dtype=torch.bool)
    padding[1, :, 24:] = True
    padding[2, 16:] = True
    return ImageBatch(pixels.masked_fill(padding[:, None], 0.0), padding)


@pytest.fixture
def targets() -> Targets:
    """Two, zero and one objects."""
    boxes = torch.zeros(3, 2, 4)
    boxes[0, 0] = torch.tensor([0.3, 0.3, 0.2, 0.2])
    boxes[0, 1] = torch.tensor([0.7, 0.6, 0.3, 0.2])
    boxes[2, 0] = torch.tensor([0.5, 0.5, 0.5, 0.9])
    labels = torch.tensor([[0, 2], [0, 0], [1, 0]])
    return Targets(labels, boxes, (2, 0, 1), (10, 11, 12), ((32, 40),) * 3, torch.tensor([2, 0, 1]))
