"""ResNet-vd against transformers' RTDetrResNetBackbone and timm's ResNet-D, the same numbers."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import RTDetrResNetBackbone, RTDetrResNetConfig

from d3etr.config.backbone import BackboneConfig
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.imports.importing import import_weights, recognise
from d3etr.detectors.imports.layouts import rename, rename_backbone
from d3etr.detectors.imports.settings import _infer_backbone
from d3etr.detectors.torchvision_backbone import TorchvisionBackbone
from d3etr.detectors.torchvision_weights import from_torchvision
from d3etr.detectors.weights import load_backbone_weights, load_strictly, write_tensors

SIZES = [(64, 96), (75, 67), (33, 129)]
KINDS = {18: ("basic", (2, 2, 2, 2)), 50: ("bottleneck", (3, 4, 6, 3))}
OFFICIAL = (
    (r"^embedder\.embedder\.(\d)\.", lambda m: f"conv1.conv1_{int(m[1]) + 1}."),
    (r"^encoder\.stages\.(\d)\.layers\.", r"res_layers.\1.blocks."),
    (r"\.layer\.(\d)\.", lambda m: f".branch2{'abc'[int(m[1])]}."),
    (r"\.shortcut\.1\.", ".short.conv."),
    (r"\.shortcut\.", ".short."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".norm."),
)
"""From Hugging Face's names to PResNet's, as the official repository's modules are called."""


def with_statistics(network: nn.Module) -> nn.Module:
    """Random running statistics, scales and shifts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1, generator=generator)
                module.bias.normal_(std=0.1, generator=generator)
    return network.eval()


@functools.cache
def theirs(depth: int) -> nn.Module:
    torch.manual_seed(0)
    kind, blocks = KINDS[depth]
    widths = (64, 128, 256, 512) if kind == "basic" else (256, 512, 1024, 2048)
    config = RTDetrResNetConfig(
        layer_type=kind,
        depths=[*blocks],
        hidden_sizes=[*widths],
        out_features=["stage2", "stage3", "stage4"],
    )
    return with_statistics(RTDetrResNetBackbone(config))


@functools.cache
def timms(depth: int) -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(timm.create_model(f"resnet{depth}d", pretrained=False, num_classes=3))


def ours(depth: int, tensors: dict[str, Tensor], **settings: object) -> TorchvisionBackbone:
    backbone = build_backbone(
        BackboneConfig.model_validate({"name": f"resnet{depth}vd", **settings})
    )
    assert isinstance(backbone, TorchvisionBackbone)
    load_strictly(backbone, from_torchvision(backbone.config.name, tensors), "theirs")
    return backbone


def official(depth: int) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in theirs(depth).state_dict().items():
        for pattern, replacement in OFFICIAL:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def require_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


@pytest.mark.parametrize("depth", KINDS)
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_maps_are_those_of_transformers(depth: int, norm: str) -> None:
    backbone = ours(depth, rename_backbone(theirs(depth).state_dict()), norm=norm).eval()
    for height, width in SIZES:
        pixels = torch.randn(2, 3, height, width)
        with torch.no_grad():
            require_close(backbone.pyramid(pixels, 3), [*theirs(depth)(pixels).feature_maps])


@pytest.mark.parametrize("depth", KINDS)
def test_maps_are_those_of_timm(depth: int, tmp_path: Path) -> None:
    """Whose network of basic blocks has no convolution beside the first block."""
    state = timms(depth).state_dict()
    assert ("layer1.0.downsample.1.weight" in state) == (depth == 50)
    write_tensors(tmp_path / "timm.safetensors", state, {})
    backbone = build_backbone(BackboneConfig(name=f"resnet{depth}vd")).eval()
    load_backbone_weights(backbone, tmp_path / "timm.safetensors")
    for height, width in SIZES:
        pixels = torch.randn(2, 3, height, width)
        with torch.no_grad():
            expected = timms(depth).forward_intermediates(pixels, intermediates_only=True)
            require_close(backbone.pyramid(pixels, 4), expected[1:])


@pytest.mark.parametrize("depth", KINDS)
def test_a_training_step_is_that_of_transformers(depth: int) -> None:
    """Maps of a batch's own statistics, what is kept of them, and every gradient."""
    network = theirs(depth)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    backbone = ours(depth, rename_backbone(before), norm="batch").double().train()
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    try:
        network.double().train()
        expected = [*network(pixels).feature_maps]
        found = backbone.pyramid(pixels, 3)
        require_close(found, expected, 1e-9)
        for maps in (expected, found):
            sum(x.square().mean() for x in maps).backward()
        gradients = rename_backbone({n: p.grad for n, p in network.named_parameters()})
        parameters = dict(backbone.named_parameters())
        assert parameters.keys() == gradients.keys()
        largest = max(gradient.abs().max() for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert (parameters[name].grad - gradient).abs().max() < 1e-9 * largest, name
        after = rename_backbone(network.state_dict())
        for name, buffer in backbone.named_buffers():
            torch.testing.assert_close(buffer, after[name])
            assert not torch.equal(buffer.float(), rename_backbone(before)[name])
    finally:
        network.zero_grad()
        network.float().eval().load_state_dict(before)


@pytest.mark.parametrize("depth", KINDS)
def test_official_names_are_hugging_faces(depth: int) -> None:
    """Of whole detectors' and backbones' files."""
    expected = rename_backbone(theirs(depth).state_dict())
    assert "conv1.conv1_1.conv.weight" in official(depth)
    assert "res_layers.1.blocks.0.short.conv.conv.weight" in official(depth)
    found = rename_backbone(official(depth))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    counted = {f"backbone.{name}" for name in found if not name.endswith("num_batches_tracked")}
    hugging_faces = {f"model.backbone.model.{n}": x for n, x in theirs(depth).state_dict().items()}
    for whole in (hugging_faces, {f"backbone.{n}": x for n, x in official(depth).items()}):
        renamed = rename(whole, "detr")
        assert {*renamed} == counted
        assert _infer_backbone(renamed) == f"resnet{depth}vd"


@pytest.mark.parametrize("source", ["official", "timm"])
@pytest.mark.parametrize("depth", KINDS)
def test_files_of_backbones_are_imported(depth: int, source: str, tmp_path: Path) -> None:
    state = official(depth) if source == "official" else timms(depth).state_dict()
    torch.save(state, tmp_path / "theirs.pth")
    target = tmp_path / "ours.safetensors"
    imported = import_weights(tmp_path / "theirs.pth", target)
    assert (imported.network, imported.kind) == (f"resnet{depth}vd", "a ResNet-vd")
    backbone = build_backbone(BackboneConfig(name=imported.network, norm="batch"))
    load_backbone_weights(backbone, target)
    first = next(iter(state.values()))
    assert torch.equal(backbone.state_dict()["conv1.0.weight"], first)
    write_tensors(tmp_path / "theirs.safetensors", state, {})
    named = BackboneConfig(name=imported.network)
    again = import_weights(tmp_path / "theirs.safetensors", target, backbone=named)
    assert again.tensors == imported.tensors


def test_other_deep_networks_are_not_recognised() -> None:
    assert recognise(timm.create_model("resnet26d", pretrained=False).state_dict()) is None
