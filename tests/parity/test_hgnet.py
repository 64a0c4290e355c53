"""HGNetV2 (timm's network) against transformers' HGNetV2Backbone, the same numbers."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from test_resnet_vd import require_close, with_statistics
from timm.models.hgnet import model_cfgs
from torch import Tensor, nn

from d3etr.config.backbone import BackboneConfig
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.batch_norm import BatchNorm2d
from d3etr.detectors.exports.backbones import describe_backbone
from d3etr.detectors.frozen_norms import FrozenNorm
from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.imports.layouts import rename, rename_backbone
from d3etr.detectors.imports.settings import _infer_backbone
from d3etr.detectors.timm_backbone import TimmBackbone, build_timm
from d3etr.detectors.timm_weights import INNER, from_timm
from d3etr.detectors.weights import load_backbone_weights, load_strictly, write_tensors
from d3etr.errors import UserError

transformers = pytest.importorskip("transformers")

SIZES = [(64, 96), (75, 67), (33, 129)]
OFFICIAL = (
    (r"^embedder\.", "stem."),
    (r"^encoder\.stages\.", "stages."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".bn."),
)
"""From Hugging Face's names to those of D-FINE's repository."""


def configuration(size: int, **options: Any) -> Any:
    """Of their network B0 to B6, with maps of all four stages."""
    facts: dict[str, Any] = model_cfgs[f"hgnetv2_b{size}"]
    stages = list(zip(*(facts[f"stage{k}"] for k in range(1, 5)), strict=True))
    keys = ("in_channels", "mid_channels", "out_channels", "num_blocks")
    keys += ("downsample", "light_block", "kernel_size", "numb_of_layers")
    return transformers.HGNetV2Config(
        stem_channels=[3, *facts["stem_chs"]],
        hidden_sizes=[*stages[2]],
        **{f"stage_{key}": [*values] for key, values in zip(keys, stages, strict=True)},
        **{
            "use_learnable_affine_block": size < 4,
            "out_features": [f"stage{k}" for k in range(1, 5)],
            **options,
        },
    )


@functools.cache
def theirs(size: int, affine: bool) -> nn.Module:
    torch.manual_seed(0)
    config = configuration(size, use_learnable_affine_block=affine)
    network = transformers.HGNetV2Backbone(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lab." in name:
                parameter.add_(0.2 * torch.randn(1))
    return with_statistics(network)


def ours(size: int, tensors: dict[str, Tensor], **settings: object) -> TimmBackbone:
    config = BackboneConfig.model_validate({"name": f"timm/hgnetv2_b{size}", **settings})
    backbone = build_backbone(config)
    assert isinstance(backbone, TimmBackbone)
    load_strictly(backbone, from_timm(backbone, tensors), "theirs")
    return backbone.eval()


def official(size: int, affine: bool) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in theirs(size, affine).state_dict().items():
        for pattern, replacement in OFFICIAL:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize(("size", "affine"), [(0, True), (0, False), (4, False)])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
@torch.no_grad()
def test_maps_are_those_of_transformers(size: int, affine: bool, norm: str) -> None:
    """Of images whose sides are no multiples of the stride, too."""
    network = theirs(size, affine)
    backbone = ours(size, rename_backbone(network.state_dict()), norm=norm)
    for height, width in SIZES:
        pixels = torch.randn(2, 3, height, width)
        expected = [*network(pixels).feature_maps]
        require_close(backbone.pyramid(pixels, 4), expected)
        assert expected[-1].std() > 0.01
        rows, columns = -(-height // 32), -(-width // 32)
        assert expected[-1].shape[-2:] == (rows, columns)


@pytest.mark.parametrize("size", [0, 4])
@torch.no_grad()
def test_maps_are_those_of_timm(size: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = with_statistics(timm.create_model(f"hgnetv2_b{size}", pretrained=False))
    write_tensors(tmp_path / "timm.safetensors", network.state_dict(), {})
    backbone = build_backbone(BackboneConfig(name=f"timm/hgnetv2_b{size}")).eval()
    load_backbone_weights(backbone, tmp_path / "timm.safetensors")
    for height, width in SIZES:
        pixels = torch.randn(1, 3, height, width)
        expected = network.forward_intermediates(pixels, intermediates_only=True)
        require_close(backbone.pyramid(pixels, 4), expected)


def test_frozen_norms_are_taken_up_by_convolutions() -> None:
    state = rename_backbone(theirs(0, True).state_dict())
    frozen, trained = ours(0, state), ours(0, state, norm="batch")
    norms = [module for module in frozen.modules() if isinstance(module, FrozenNorm)]
    assert len(norms) == len([m for m in trained.modules() if isinstance(m, BatchNorm2d)]) == 42
    assert {*frozen.state_dict()} == {*trained.state_dict()}
    assert not any(".bn." in name for name, _ in frozen.named_parameters())
    assert any(".bn." in name for name, _ in trained.named_parameters())
    sum(m.square().mean() for m in frozen.pyramid(torch.randn(1, 3, 64, 64), 4)).backward()
    assert all(parameter.grad is not None for parameter in frozen.parameters())


def test_frozen_stages_begin_at_the_stem() -> None:
    first = []
    for stages in range(4):
        backbone = ours(0, official(0, True), norm="batch", frozen_stages=stages)
        state = [parameter.requires_grad for parameter in backbone.parameters()]
        assert state == sorted(state)
        names = [name for name, _ in backbone.named_parameters()]
        first.append(names[state.index(True)].removeprefix(INNER).split(".blocks")[0])
    later = [f"stages.{stage}.downsample.conv.weight" for stage in (1, 2)]
    assert first == ["stem.stem1.conv.weight", "stages.0", *later]


def test_a_training_step_is_that_of_transformers() -> None:
    """Maps of a batch's own statistics, what is kept of them, and every gradient."""
    network = transformers.HGNetV2Backbone(configuration(0)).double().train()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    backbone = ours(0, rename_backbone(state), norm="batch").double().train()
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    expected, found = [*network(pixels).feature_maps], backbone.pyramid(pixels, 4)
    require_close(found, expected, 1e-9)
    for maps in (expected, found):
        sum(x.square().mean() for x in maps).backward()
    gradients = rename_backbone({n: p.grad for n, p in network.named_parameters()})
    parameters = {n.removeprefix(INNER): p.grad for n, p in backbone.named_parameters()}
    assert parameters.keys() == gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (parameters[name] - gradient).abs().max() < 1e-9 * largest, name
    after = rename_backbone(network.state_dict())
    for name, buffer in backbone.named_buffers():
        torch.testing.assert_close(buffer, after[name.removeprefix(INNER)])


@pytest.mark.parametrize("affine", [True, False])
def test_official_names_are_timms(affine: bool) -> None:
    """Of whole detectors' and backbones' files."""
    state, expected = official(0, affine), rename_backbone(theirs(0, affine).state_dict())
    found = rename_backbone(state)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert ("stages.2.blocks.0.layers.0.conv2.lab.scale" in state) == affine
    assert torch.equal(found["stem.stem1.lab.scale"], torch.ones(1)) != affine
    hugging_faces = theirs(0, affine).state_dict()
    for whole in (
        {f"model.backbone.model.{name}": x for name, x in hugging_faces.items()},
        {f"backbone.{name}": x for name, x in state.items()},
    ):
        renamed = rename(whole, "d_fine")
        kept = {name for name in found if not name.endswith("num_batches_tracked")}
        assert {*renamed} == {f"backbone.{INNER}{name}" for name in kept}
        assert _infer_backbone(renamed) == "timm/hgnetv2_b0"


@pytest.mark.parametrize("size", range(7))
def test_every_size_is_recognised(size: int) -> None:
    with torch.device("meta"):
        network = transformers.HGNetV2Backbone(configuration(size))
        ours = timm.create_model(f"hgnetv2_b{size}", pretrained=False).state_dict()
    state = {f"model.backbone.model.{name}": x for name, x in network.state_dict().items()}
    renamed = rename(state, "d_fine")
    assert _infer_backbone(renamed) == f"timm/hgnetv2_b{size}"
    shapes = {name.removeprefix(f"backbone.{INNER}"): x.shape for name, x in renamed.items()}
    assert shapes == {
        name: x.shape
        for name, x in ours.items()
        if not name.startswith("head.") and not name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("size", ["atto", "femto", "pico"])
@torch.no_grad()
def test_sizes_of_three_stages_equal_transformers(size: str) -> None:
    config = BackboneConfig(name=f"timm/hgnetv2_{size}")
    backbone = build_backbone(config).eval()
    settings = describe_backbone(config, 3)
    torch.manual_seed(0)
    network = with_statistics(transformers.HGNetV2Backbone(transformers.HGNetV2Config(**settings)))
    assert isinstance(backbone, TimmBackbone)
    renamed = rename_backbone(network.state_dict())
    load_strictly(backbone, from_timm(backbone, renamed), "theirs")
    for height, width in SIZES:
        pixels = torch.randn(2, 3, height, width)
        require_close(backbone.pyramid(pixels, 3), [*network(pixels).feature_maps])
    assert (backbone.stage_strides, backbone.stride) == ((4, 8, 16), 16)
    with pytest.raises(UserError, match=f"no weights of ImageNet for timm/hgnetv2_{size}"):
        build_timm(config.name, pretrained=True)


def test_other_sizes_are_refused() -> None:
    wide = {f"backbone.{name}": x for name, x in official(4, False).items()}
    with pytest.raises(UserError, match="expected one of the sizes B0 to B6"):
        _infer_backbone(rename({n: x for n, x in wide.items() if ".2.blocks.2." not in n}, "detr"))
    wide["backbone.stem.stem1.lab.scale"] = torch.ones(1)
    with pytest.raises(UserError, match="stages and learnable affine blocks: expected one"):
        _infer_backbone(rename(wide, "detr"))


@pytest.mark.parametrize("source", ["official", "hugging face"])
def test_files_of_backbones_are_imported(source: str, tmp_path: Path) -> None:
    state = official(0, True)
    if source == "hugging face":  # as a classifier's
        state = {f"hgnetv2.{n}": x for n, x in theirs(0, True).state_dict().items()}
        state["fc.weight"] = torch.zeros(3, 1024)
    torch.save(state, tmp_path / "theirs.pth")
    target, named = tmp_path / "ours.safetensors", BackboneConfig(name="timm/hgnetv2_b0")
    imported = import_weights(tmp_path / "theirs.pth", target, backbone=named)
    assert imported.kind == "a network of timm"
    backbone = build_backbone(named)
    load_backbone_weights(backbone, target)
    first = next(iter(state.values()))
    assert torch.equal(backbone.state_dict()[f"{INNER}stem.stem1.conv.weight"], first)
