"""All detectors of the family over torchvision's networks, and their weights files."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import FAMILY, tiny_detector_config

from d3etr import inference
from d3etr.config.backbone import BackboneConfig
from d3etr.config.data import PreprocessingConfig
from d3etr.detectors import backbones, base
from d3etr.detectors.build import build_detector
from d3etr.detectors.weights import WeightsInfo, load_weights, save_weights
from d3etr.structures import ImageBatch

build_once = functools.cache(backbones.build_backbone)


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t"])
@pytest.mark.parametrize("variant", FAMILY)
def test_every_detector_runs_over_it(
    variant: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "build_backbone", build_once)
    backbone = {"name": name, "frozen_stages": 1}
    settings = {"width": 32, **FAMILY[variant], "backbone": backbone}
    detector = build_detector(tiny_detector_config(**settings), 3)
    padding = torch.zeros(2, 45, 70, dtype=torch.bool)
    padding[1, 40:], padding[1, :, 36:] = True, True
    memory = detector.encode(ImageBatch(torch.randn(2, 3, 45, 70), padding))
    [outputs] = detector.decode(memory, [detector.object_queries(memory)])
    grids = {(32,): ((2, 3),), (16, 32): ((3, 5), (2, 3)), (32, 64): ((2, 3), (1, 2))}
    assert memory.levels == grids[detector.level_strides]
    assert outputs.logits.shape[:3] == (2, 2, 5)
    (outputs.logits.sum() + outputs.boxes_cxcywh.sum()).backward()
    parameters = [p for p in detector.backbone.parameters() if p.requires_grad]
    assert 0 < len(parameters) < len(list(detector.backbone.parameters()))
    assert all(parameter.grad is not None for parameter in parameters)
    build_once(detector.config.backbone).zero_grad()


@pytest.mark.parametrize("name", ["swin_v2_t", "mobilenet_v3_small"])
def test_its_weights_file_is_enough_to_predict(name: str, tmp_path: Path) -> None:
    config = tiny_detector_config(backbone={"name": name})
    detector = build_detector(config, 2).eval()
    path = tmp_path / "weights.safetensors"
    preprocessing = PreprocessingConfig(shortest_side=None)
    categories = ((1, "tree"), (2, "cat"))
    save_weights(
        path,
        detector,
        WeightsInfo(detector=config, categories=categories, preprocessing=preprocessing),
    )
    state = load_weights(path)[0].state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in detector.state_dict().items())
    pixels = np.random.default_rng(0).integers(0, 256, (50, 41, 3), dtype=np.uint8)
    [found] = inference.load(path, device="cpu").predict(pixels, threshold=0)
    assert len(found) == 10 and np.isfinite(found.boxes_xyxy).all()


def test_what_a_configuration_says_of_weights() -> None:
    assert BackboneConfig(name="densenet121").keeps_statistics
    assert not BackboneConfig(name="densenet121", norm="group").keeps_statistics
    assert not BackboneConfig(name="densenet121", norm="batch").keeps_statistics
    assert not BackboneConfig(name="swin_t").keeps_statistics
    assert not BackboneConfig(name="small").keeps_statistics
