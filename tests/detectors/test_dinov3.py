"""DINOv3 with the spatial tuning adapter as a backbone, and DEIMv2's own settings.

What it computes is compared with transformers' in ``tests/parity/test_deimv2_parity.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import FAMILY, tiny_detector_config

from d3etr.config.backbone import BackboneConfig
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.build import build_detector
from d3etr.detectors.dinov3 import DINOv3, Rotation
from d3etr.detectors.torchvision_weights import imagenet_weights
from d3etr.errors import UserError
from d3etr.structures import ImageBatch

SIZES: dict[str, Any] = {
    **{"width": 16, "blocks": 4, "heads": 2, "inner": 24, "outputs": (2, 3, 4)},
    **{"registers": 2, "detail": 4, "first_scale": 1.0},
}


def network(**changes: Any) -> DINOv3:
    torch.manual_seed(0)
    settings = {"name": "dinov3", "dinov3": SIZES | changes}
    backbone = build_backbone(BackboneConfig.model_validate(settings))
    assert isinstance(backbone, DINOv3)
    return backbone


@torch.no_grad()
def test_maps_are_as_large_as_strides_say() -> None:
    backbone = network().eval()
    assert (backbone.stage_channels, backbone.stage_strides) == ((24, 32, 32), (8, 16, 32))
    for height, width in ((64, 96), (45, 70), (33, 31)):
        pixels = torch.randn(2, 3, height, width)
        padded = torch.zeros(2, 3, -(-height // 32) * 32, -(-width // 32) * 32)
        padded[..., :height, :width] = pixels
        maps, whole = backbone.pyramid(pixels, 3), backbone.pyramid(padded, 3)
        for stride, channels, found, expected in zip(
            backbone.stage_strides, backbone.stage_channels, maps, whole, strict=True
        ):
            rows, columns = -(-height // stride), -(-width // stride)
            assert found.shape == (2, channels, rows, columns)
            assert torch.equal(found, expected[..., :rows, :columns])
        assert torch.equal(backbone(pixels), maps[-1])


@pytest.mark.parametrize("feedforward", ["gelu", "silu_gated", "gelu_gated"])
@pytest.mark.parametrize("normed", ["all", "last", "none"])
def test_every_parameter_takes_part(feedforward: str, normed: str) -> None:
    backbone = network(feedforward=feedforward, normed=normed).train()
    sum(part.square().mean() for part in backbone.pyramid(torch.randn(2, 3, 64, 64), 3)).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@torch.no_grad()
def test_attention_depends_on_how_far_patches_are_from_each_other() -> None:
    """Of one query and one key at all patches; what stands before them is not turned."""
    turn = Rotation((3, 5), 8, torch.zeros(1))
    query, key = (x.expand(1, 1, 17, 8) for x in torch.randn(2, 1, 1, 1, 8))
    assert torch.equal(turn(query)[..., :2, :], query[..., :2, :])
    scores = (turn(query) @ turn(key).transpose(-1, -2))[0, 0, 2:, 2:].view(3, 5, 3, 5)
    torch.testing.assert_close(scores[0, 1, 1, 3], scores[1, 2, 2, 4])
    torch.testing.assert_close(scores[2, 4, 0, 4], scores[2, 0, 0, 0])
    assert (scores[0, 0, 1, 0] - scores[1, 0, 0, 0]).abs() > 1e-3


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dinov3": {"heads": 5}}, r"must be a multiple of 4 \* heads"),
        ({"dinov3": {"outputs": (2, 3, 3)}}, "must rise to blocks"),
        ({"dinov3": {"outputs": (6, 9, 11)}}, "later blocks would have no effect"),
        ({"name": "small", "dinov3": {"registers": 0}}, "dinov3 has no effect"),
        ({"frozen_stages": 1}, "not for 'dinov3': set trainable"),
        ({"norm": "batch"}, "norm has no effect"),
    ],
)
def test_networks_that_are_none_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        BackboneConfig.model_validate({"name": "dinov3", **changes})


def test_there_are_no_weights_of_imagenet() -> None:
    with pytest.raises(UserError, match="'dinov3', which has none: start from a whole detector"):
        imagenet_weights(BackboneConfig(name="dinov3"))


def test_a_detector_over_it_learns_in_all_parts() -> None:
    torch.manual_seed(0)
    own = {"levels": 3, "points": (2, 2, 2), "backbone": {"name": "dinov3", "dinov3": SIZES}}
    config = tiny_detector_config(**FAMILY["deimv2"] | own)
    detector = build_detector(config, 3).train()
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, :, 70:] = True
    memory = detector.encode(ImageBatch(torch.randn(2, 3, 64, 96), padding))
    assert memory.levels == ((8, 12), (4, 6), (2, 3))
    [outputs] = detector.decode(memory, [detector.object_queries(memory)])
    (outputs.logits.square().sum() + outputs.boxes_cxcywh.sum()).backward()
    assert all(x.grad is not None for x in detector.backbone.parameters())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"encoder": "lite"}, "encoder 'lite' has 2 levels and no attention"),
        ({"feedforward": 15}, "feedforward is 15: expected an even number"),
        ({"fusion": "elan"}, "'elan4' or 'elan5'"),
        ({"expansion": 0.05}, "expansion 0.05 leaves the encoder no channels"),  # 0.6 of half
    ],
)
def test_deimv2s_that_are_none_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        tiny_detector_config(**{**FAMILY["deimv2"], **changes})
