"""Timm's vision transformers as backbones: maps, freezing, weights, and detectors over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from timm.models import list_modules
from tiny import FAMILY, tiny_detector_config
from torch import nn
from torch.nn import functional

from d3etr.config.backbone import BackboneConfig
from d3etr.config.backbones import is_timm_vit
from d3etr.config.data import PreprocessingConfig
from d3etr.config.distillation import MethodConfig
from d3etr.config.training import OptimisationConfig, SetCriterionConfig
from d3etr.detectors import timm_weights
from d3etr.detectors.backbones import build_backbone, store_channels_last
from d3etr.detectors.build import build_detector
from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.timm_vit import TimmViT
from d3etr.detectors.weights import (
    WeightsInfo,
    load_backbone_weights,
    load_weights,
    save_weights,
    write_tensors,
)
from d3etr.distiller import Distiller
from d3etr.engine.optimiser import build_optimiser
from d3etr.errors import UserError
from d3etr.structures import ImageBatch, Targets

TINY, DINOV2, DINOV3 = "test_vit", "vit_small_patch14_dinov2", "vit_tiny_patch16_dinov3_qkvb"


def built(name: str = TINY, **settings: Any) -> TimmViT:
    torch.manual_seed(0)
    config = BackboneConfig.model_validate({"name": f"timm/{name}", **settings}, strict=False)
    backbone = build_backbone(config)
    assert isinstance(backbone, TimmViT)
    return backbone.eval()


def timms(name: str = TINY, **settings: Any) -> Any:
    """Timm's own, with classifier; layers that start at nothing say something."""
    torch.manual_seed(1)
    network = timm.create_model(name, pretrained=False, **settings).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def with_weights_of(theirs: nn.Module, name: str, **settings: Any) -> TimmViT:
    ours = built(name, **settings)
    tensors = theirs.state_dict()
    ours.network.load_state_dict({key: tensors[key] for key in ours.network.state_dict()})
    return ours


@pytest.mark.parametrize(("height", "width"), [(0, 0), (-5, 3)])
@pytest.mark.parametrize("grid", [(3, 5), (7, 4)])
@pytest.mark.parametrize("name", [TINY, DINOV2, DINOV3])
@torch.no_grad()
def test_maps_are_those_of_timms_own_network(
    name: str, grid: tuple[int, int], height: int, width: int
) -> None:
    """Bit for bit, whatever the size; what does not fill a patch is filled up with zeros."""
    theirs = timms(name, dynamic_img_size=True)
    ours = with_weights_of(theirs, name)
    store_channels_last(theirs)  # as ours are stored: sums in the same order
    patch = ours.stride
    pixels = torch.randn(2, 3, grid[0] * patch + height, grid[1] * patch + width)
    padded = functional.pad(pixels, (0, -width % patch, 0, -height % patch))
    blocks = len(theirs.blocks)
    indices = [-(-blocks * part // 4) - 1 for part in (1, 2, 3, 4)]
    expected = theirs.forward_intermediates(
        padded, indices=indices, norm=True, intermediates_only=True
    )
    found = ours.maps(pixels)
    assert found[0].shape == (2, ours.channels, grid[0], grid[1] + (width > 0))
    assert len(found) == 4 and ours.map_channels == (ours.channels,) * 4
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(ours(pixels), found[-1]) and torch.equal(*ours.pyramid(pixels, 3), found[-1])
    if indices[-1] == blocks - 1:  # the last map is what classifies, without its prefix tokens
        tokens = theirs.forward_features(padded)
        prefix = theirs.num_prefix_tokens
        assert torch.equal(found[-1].flatten(2).mT, tokens[:, prefix:])


@torch.no_grad()
def test_outputs_leave_out_later_blocks() -> None:
    theirs = timms(dynamic_img_size=True)
    ours, pixels = with_weights_of(theirs, TINY, outputs=[1, 3]), torch.randn(1, 3, 32, 48)
    assert len(ours.network.blocks) == 3
    store_channels_last(theirs)
    expected = theirs.forward_intermediates(
        pixels, indices=[0, 2], norm=True, intermediates_only=True
    )
    assert all(torch.equal(a, b) for a, b in zip(ours.maps(pixels), expected, strict=True))


def test_a_norm_of_the_mean_is_left_out() -> None:
    """Where timm norms the mean of tokens, tokens come as they are."""
    backbone = built("test_vit2")
    assert isinstance(backbone.network.norm, nn.Identity)
    assert isinstance(timms("test_vit2").fc_norm, nn.LayerNorm)


def test_frozen_stages_are_embeddings_and_blocks() -> None:
    def frozen(stages: int) -> set[str]:
        backbone = built("test_vit3", frozen_stages=stages)
        fixed = {name for name, p in backbone.named_parameters() if not p.requires_grad}
        return {name.removeprefix("network.").partition(".attn")[0] for name in fixed}

    def parts(stages: int) -> set[str]:
        names = {name.split(".")[0] for name in frozen(stages)}
        return names | {name for name in frozen(stages) if name.startswith("blocks")}

    assert frozen(0) == set()
    assert parts(1) == {"reg_token", "pos_embed", "patch_embed"}
    assert {n.split(".")[1] for n in frozen(3) if n.startswith("blocks")} == {"0", "1"}
    with pytest.raises(UserError, match="expected 6 at most"):
        built(frozen_stages=7)


@pytest.mark.parametrize("name", [TINY, "test_vit3", DINOV3])
def test_every_parameter_takes_part(name: str) -> None:
    backbone = built(name).train()
    sum(m.sum() for m in backbone.maps(torch.randn(2, 3, 32, 32))).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_drop_path_rises_over_the_blocks_in_training_only() -> None:
    backbone = built(drop_path=0.5)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.network.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(pixels), backbone(pixels))
    backbone.train()
    assert not torch.equal(backbone(pixels), backbone(pixels))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"norm": "group"}, "norm has no effect on backbone 'timm/test_vit'"),
        ({"outputs": [2, 1]}, "must rise"),
        ({"outputs": [0, 1]}, "must rise from 1"),
        ({"name": "vit", "outputs": [1]}, "its own are vit.outputs"),
        ({"name": "dinov3", "outputs": [1]}, "its own are dinov3.outputs"),
        ({"name": "timm/resnet10t", "outputs": [1]}, "outputs has no effect"),
        ({"name": "timm/resnet10t", "frozen_stages": 6}, "at most four stages, 5 in all"),
        ({"name": "small", "drop_path": 0.1}, "drop_path has no effect on backbone 'small'"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        BackboneConfig.model_validate({"name": "timm/test_vit", **settings}, strict=False)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test_vit9", "did you mean timm/test_vit"),
        ("test_vit_relpos", "images of one size only"),
        ("vit_tiny_r_s16_p8_224", "is no plain vision transformer"),
        ("test_vit", "outputs .* has 6 blocks only"),
    ],
)
def test_networks_that_cannot_be_backbones_are_refused(name: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        built(name, outputs=[7])


def test_names_are_those_of_timms_modules() -> None:
    named = {
        name
        for module in ("vision_transformer", "deit", "eva")
        for name in timm.list_models(module=module)
    }
    assert len(named) > 200 and "vision_transformer" in list_modules()
    assert [name for name in named if not is_timm_vit(f"timm/{name}")] == []
    assert not BackboneConfig(name="timm/eva02_tiny_patch14_224").keeps_statistics


@pytest.mark.parametrize("name", [TINY, "test_vit2", "vit_xsmall_patch16_clip_224"])
@torch.no_grad()
def test_weights_are_for_pixels_of_our_normalisation(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernel and bias, or positions where there is no bias, make up for the other normalisation."""
    theirs = timms(name, dynamic_img_size=True)
    write_tensors(tmp_path / "timm.safetensors", theirs.state_dict(), {})
    mean, std = (torch.tensor(theirs.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    our_mean, our_std = torch.tensor(timm_weights.MEAN), torch.tensor(timm_weights.STD)
    image = torch.rand(1, 3, 48, 64)
    expected = theirs.forward_intermediates(
        (image - mean) / std, indices=1, norm=True, intermediates_only=True
    )[0]
    ours = built(name)
    load_backbone_weights(ours, tmp_path / "timm.safetensors")
    pixels = (image - our_mean[:, None, None]) / our_std[:, None, None]
    torch.testing.assert_close(ours(pixels), expected, rtol=1e-4, atol=1e-4)
    imported = tmp_path / "imported.safetensors"
    config = BackboneConfig(name=f"timm/{name}")
    assert import_weights(tmp_path / "timm.safetensors", imported, backbone=config).tensors
    again, downloaded = built(name), built(name)
    load_backbone_weights(again, imported)
    monkeypatch.setattr(timm_weights, "build_timm_vit", lambda name, pretrained: theirs)
    load_backbone_weights(downloaded, "imagenet")
    for key, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)
        assert torch.equal(downloaded.state_dict()[key], tensor)


OF_STRIDES = ("rt_detr", "d_fine", "deimv2")
"""Kinds that read each level from a stage of the backbone."""


@pytest.mark.parametrize("kind", FAMILY)
def test_detectors_learn_over_it_and_are_kept(kind: str, tmp_path: Path) -> None:
    settings = {"width": 32, "heads": 4, **FAMILY[kind]}
    if kind in OF_STRIDES:
        settings |= {"levels": 1, "points": 2 if kind == "rt_detr" else [2]}
    settings["backbone"] = {"name": "timm/test_vit", "outputs": [1, 2]}
    torch.manual_seed(0)
    detector = build_detector(tiny_detector_config(**settings), 3).train()
    images = ImageBatch(torch.randn(2, 3, 90, 70))
    memory = detector.encode(images)
    assert (6, 5) in memory.levels
    distiller = Distiller(detector, None, MethodConfig.parse({}), SetCriterionConfig(), seed=0)
    boxes = torch.tensor([[[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2]]]).repeat(2, 1, 1)
    labels, counts = torch.tensor([[0, 2], [1, 0]]), torch.tensor([2, 2])
    targets = Targets(labels, boxes, (2, 2), (1, 2), ((90, 70),) * 2, counts)
    optimiser = build_optimiser(distiller, detector.backbone, OptimisationConfig(steps=1))
    before = {name: p.clone() for name, p in detector.backbone.named_parameters()}
    taught = distiller.run_teacher(images, 0)
    losses = distiller(images, targets, taught, distiller.normalisers(targets, taught))
    sum(losses.values()).backward()
    optimiser.step()
    for name, parameter in detector.backbone.named_parameters():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name
    target = tmp_path / "weights.safetensors"
    info = WeightsInfo(
        detector=detector.config,
        categories=tuple((k, str(k)) for k in range(3)),
        preprocessing=PreprocessingConfig(),
    )
    save_weights(target, detector.eval(), info)
    loaded, found = load_weights(target)
    assert found.detector == detector.config
    with torch.no_grad():
        assert torch.equal(detector.encode(images).tokens, loaded.encode(images).tokens)


@pytest.mark.parametrize("kind", OF_STRIDES)
def test_detectors_of_several_strides_say_what_they_need(kind: str) -> None:
    config = tiny_detector_config(**FAMILY[kind], backbone={"name": "timm/test_vit"})
    with pytest.raises(UserError, match=r"gives strides \[16\] only: set levels to 1, choose"):
        build_detector(config, 3)
