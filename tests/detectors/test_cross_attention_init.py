"""Where an untrained Conditional DETR looks."""

from __future__ import annotations

import torch
from torch import Tensor

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.build import build_detector
from d3etr.structures import ImageBatch, ObjectQueries


def _distances(config: DetectorConfig) -> Tensor:
    """[L] mean distance between reference points and what attention looks at, in image sizes."""
    torch.manual_seed(0)
    detector = build_detector(config, 3).eval()
    points = torch.rand(40, 2) * 0.8 + 0.1
    queries = ObjectQueries(torch.randn(40, config.width), points.logit())
    with torch.no_grad():
        memory = detector.encode(ImageBatch(torch.randn(2, 3, 128, 128)))
        (outputs,) = detector.decode(memory, [queries], attention=True)
    maps = outputs.cross_attention.mean(2).unflatten(-1, (16, 16))
    cells = (torch.arange(16) + 0.5) / 16
    y, x = torch.meshgrid(cells, cells, indexing="ij")
    away = (x - points[:, :1, None]).square() + (y - points[:, 1:, None]).square()
    return (maps * away.sqrt()).sum((-1, -2)).mean((1, 2))


def test_untrained_attention_is_around_the_reference_points(tiny_config: DetectorConfig) -> None:
    config = tiny_config.model_copy(update={"width": 128, "heads": 8})
    anywhere = _distances(config)
    reference = _distances(config.model_copy(update={"cross_attention_init": "reference_prior"}))
    assert (anywhere > 0.3).all()
    assert (reference < 0.75 * anywhere).all(), (reference, anywhere)
