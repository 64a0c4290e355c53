"""Torchvision's networks as backbones: names, maps, parity, weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping

import pytest
import timm
import torch
import torchvision
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

from d3etr.config.backbone import BackboneConfig
from d3etr.config.backbones import (
    BACKBONES,
    DINOV3,
    RESNET_VD,
    SMALL,
    TORCHVISION,
    VIT,
    family_of,
)
from d3etr.detectors import timm_weights
from d3etr.detectors.backbones import Backbone, build_backbone
from d3etr.detectors.torchvision_backbone import build_network, group_norm
from d3etr.detectors.torchvision_weights import from_torchvision
from d3etr.detectors.weights import load_backbone_weights
from d3etr.errors import UserError

STAGES: Mapping[str, tuple[str, str, str]] = {
    "resnext50_32x4d": ("layer1", "layer2", "layer3"),
    "convnext_tiny": ("features.1", "features.3", "features.5"),
    "swin_t": ("features.1", "features.3", "features.5"),
    "swin_v2_t": ("features.1", "features.3", "features.5"),
    "efficientnet_b0": ("features.2", "features.3", "features.5"),
    "mobilenet_v2": ("features.3", "features.6", "features.13"),
    "mobilenet_v3_small": ("features.1", "features.3", "features.8"),
    "regnet_x_400mf": ("trunk_output.block1", "trunk_output.block2", "trunk_output.block3"),
    "regnet_y_400mf": ("trunk_output.block1", "trunk_output.block2", "trunk_output.block3"),
    "densenet121": ("features.denseblock1", "features.denseblock2", "features.denseblock3"),
    "mnasnet0_5": ("layers.8", "layers.9", "layers.11"),
    "shufflenet_v2_x0_5": ("maxpool", "stage2", "stage3"),
    "vgg11_bn": ("features.13", "features.20", "features.27"),
}
"""One small network of each kind, and the modules that its first three stages end with."""


def on_meta(name: str, **settings: object) -> Backbone:
    with torch.device("meta"):
        return build_backbone(BackboneConfig.model_validate({"name": name, **settings}))


@functools.cache
def torchvisions(name: str) -> nn.Module:
    """With random statistics and scales that show in the output."""
    torch.manual_seed(0)
    if name.startswith("vgg"):
        network = without_its_large_classifier(name)
    else:
        network = torchvision.models.get_model(name, weights=None)
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            if key.endswith(("running_var", "layer_scale")):
                tensor.uniform_(0.5, 1)
            elif key.endswith("running_mean"):
                tensor.normal_(std=0.1)
    return network.eval()


def without_its_large_classifier(name: str) -> nn.Module:
    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None)
    network.classifier = nn.Linear(512 * 7 * 7, 1)
    network.to_empty(device="cpu")
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return network


def with_weights(name: str, tensors: Mapping[str, Tensor]) -> Backbone:
    backbone = on_meta(name).eval()
    backbone.load_state_dict(from_torchvision(name, tensors), assign=True)
    return backbone


def nchw(features: Tensor, name: str) -> Tensor:
    return features.permute(0, 3, 1, 2) if family_of(name) == "Swin" else features


def test_names_are_torchvisions() -> None:
    offered = torchvision.models.list_models(module=torchvision.models)
    # Those left out work on images of one size only, or lose an image's borders.
    others = {"maxvit_t", "alexnet", "inception_v3", "googlenet", "squeezenet1_0", "squeezenet1_1"}
    vits = {name for name in offered if name.startswith("vit_")}
    assert {*TORCHVISION} == {*offered} - others - vits
    assert len(BACKBONES) == len({*BACKBONES})
    assert {*BACKBONES} == {SMALL, VIT, DINOV3, *TORCHVISION, *RESNET_VD}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TORCHVISION, *RESNET_VD])
def test_every_network_has_four_stages(name: str) -> None:
    backbone = on_meta(name)
    assert backbone.stage_strides == (4, 8, 16, 32)
    assert (backbone.stride, backbone.channels) == (32, backbone.stage_channels[3])
    assert all(tensor.is_meta for tensor in backbone.state_dict().values())
    norms = any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules())
    assert norms == backbone.config.has_batch_norm
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())


@pytest.mark.parametrize(
    "name", ["resnext50_32x4d", "mobilenet_v2", "swin_t", "vgg11_bn", "resnet18vd"]
)
def test_maps_are_rounded_up(name: str) -> None:
    backbone = on_meta(name, norm="group" if BackboneConfig(name=name).has_batch_norm else "frozen")
    maps = backbone.pyramid(torch.empty(2, 3, 75, 1, device="meta"), 4)
    for features, channels, stride in zip(
        maps, backbone.stage_channels, backbone.stage_strides, strict=True
    ):
        assert features.shape == (2, channels, -(-75 // stride), 1)


@pytest.mark.parametrize("name", STAGES)
def test_maps_and_weights_are_torchvisions(name: str) -> None:
    theirs = torchvisions(name)
    expected: dict[str, Tensor] = {}
    children = dict(theirs.named_children())
    last = next(label for label in ("avgpool", "classifier", "fc") if label in children)
    hooks = [
        theirs.get_submodule(label).register_forward_hook(
            lambda _module, _inputs, output, label=label: expected.update({label: output.clone()})
        )
        for label in STAGES[name]
    ]
    hooks.append(
        children[last].register_forward_pre_hook(
            lambda _module, inputs: expected.update({last: inputs[0].clone()})
        )
    )
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        theirs(pixels)
        *maps, final = with_weights(name, theirs.state_dict()).pyramid(pixels, 4)
    for hook in hooks:
        hook.remove()
    for label, features in zip(STAGES[name], maps, strict=True):
        require_close(features, nchw(expected[label], name))
    require_close(final.mean((2, 3)) if expected[last].dim() == 2 else final, expected[last])


def require_close(ours: Tensor, theirs: Tensor) -> None:
    scale = theirs.abs().max()
    torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t"])
def test_odd_images_are_padded_as_in_a_batch(name: str) -> None:
    backbone = with_weights(name, torchvisions(name).state_dict())
    pixels = torch.randn(1, 3, 45, 70)
    with torch.no_grad():
        alone = backbone.pyramid(pixels, 2)
        batched = backbone.pyramid(functional.pad(pixels, (0, 26, 0, 19)), 2)
    for ours, theirs in zip(alone, batched, strict=True):
        torch.testing.assert_close(ours, theirs[..., : ours.shape[2], : ours.shape[3]])


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_only_classifier_and_counters_are_left_out(name: str) -> None:
    theirs = torchvisions(name).state_dict()
    left = set(theirs) - set(from_torchvision(name, theirs))
    tops = {key.split(".")[0] for key in left if not key.endswith("num_batches_tracked")}
    assert tops == {list(theirs)[-1].split(".")[0]} and tops <= {"classifier", "fc", "head"}


def test_densenets_old_names_are_understood() -> None:
    new = on_meta("densenet121").state_dict()
    old = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): new[key] for key in new}
    assert set(old) != set(new) == set(from_torchvision("densenet121", old))


def test_another_normalisation_is_undone() -> None:
    """EfficientNetV2-L was trained with images in [-1, 1]; our images have ImageNet's mean."""
    torch.manual_seed(0)
    kernel = nn.Conv2d(3, 4, 3, stride=2, bias=False)
    norm = nn.BatchNorm2d(4).eval()
    first = {"0.weight": kernel.weight.detach(), "1.running_mean": torch.randn(4)}
    tensors = {f"features.0.{key}": tensor for key, tensor in first.items()}
    changed = from_torchvision("efficientnet_v2_l", tensors)
    assert from_torchvision("efficientnet_v2_m", tensors) == tensors
    pixels = torch.rand(1, 3, 9, 9)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    ours = (pixels - mean[:, None, None]) / std[:, None, None]

    def run(values: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        kernel.weight.data = weights["features.0.0.weight"]
        norm.running_mean = weights["features.0.1.running_mean"]
        return norm(kernel(values))

    torch.testing.assert_close(run(ours, changed), run((pixels - 0.5) / 0.5, tensors))


@pytest.mark.parametrize(
    ("name", "stages", "frozen"),
    [
        ("convnext_tiny", 1, {"features.0"}),
        ("swin_t", 2, {"features.0", "features.1"}),
        ("efficientnet_b0", 2, {"features.0", "features.1", "features.2"}),
        ("regnet_x_400mf", 2, {"stem.0", "trunk_output.block1"}),
        ("densenet121", 1, {"features.conv0"}),
        ("resnet18vd", 1, {"conv1.0", "conv1.3", "conv1.6"}),
        ("resnet50vd", 2, {"conv1.0", "conv1.3", "conv1.6", *(f"layer1.{k}" for k in range(3))}),
        ("swin_t", 5, {*(f"features.{k}" for k in range(8)), "norm.weight", "norm.bias"}),
    ],
)
def test_frozen_stages_are_stem_and_stages(name: str, stages: int, frozen: set[str]) -> None:
    backbone = on_meta(name, frozen_stages=stages)
    names = [name for name, p in backbone.named_parameters() if not p.requires_grad]
    assert {".".join(name.split(".")[:2]) for name in names} == frozen
    assert len(names) < len(list(backbone.parameters())) or stages == 5


@pytest.mark.parametrize("name", ["swin_t", "mobilenet_v3_small"])
def test_not_trainable_freezes_everything(name: str) -> None:
    backbone = on_meta(name, trainable=False)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t", "shufflenet_v2_x0_5", "densenet121"])
def test_training_repeats_and_reaches_every_parameter(name: str) -> None:
    backbone = with_weights(name, torchvisions(name).state_dict()).train()
    pixels = torch.randn(1, 3, 32, 40)
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(backbone(pixels))
    assert torch.equal(*outputs)
    backbone.eval()(pixels).square().mean().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_a_copy_is_a_network_of_its_own() -> None:
    """Averages of weights are kept in copies."""
    original = build_backbone(BackboneConfig(name="shufflenet_v2_x0_5")).eval()
    copied = copy.deepcopy(original)
    for parameter in original.parameters():
        parameter.data.zero_()
    assert copied(torch.randn(1, 3, 32, 32)).abs().sum() > 0


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "resnet18vd"])
def test_batch_norm_is_torchvisions_in_training(name: str) -> None:
    """Maps of the batch's own statistics, and what is kept of them; frozen stages keep theirs."""
    theirs = build_network(name)
    state = from_torchvision(name, theirs.state_dict())
    backbone = build_backbone(BackboneConfig(name=name, norm="batch", frozen_stages=1))
    assert {*state} == {*build_backbone(BackboneConfig(name=name)).state_dict()}
    backbone.load_state_dict(state)
    stem = {id(x) for step in backbone._parts[0] for x in step.buffers()}
    before = {key: x.clone() for key, x in backbone.named_buffers()}
    pixels = torch.randn(2, 3, 64, 64)
    backbone.train()(pixels)
    for key, buffer in backbone.named_buffers():
        assert torch.equal(buffer, before[key]) == (id(buffer) in stem), key
    whole = build_backbone(BackboneConfig(name=name, norm="batch")).train()
    whole.load_state_dict(state)
    whole(pixels)
    theirs.train()(pixels)
    kept = from_torchvision(name, theirs.state_dict())
    for key, buffer in whole.named_buffers():
        torch.testing.assert_close(buffer, kept[key])


@pytest.mark.parametrize("channels", [8, 24, 58, 64, 144, 244, 2048])
def test_groups_divide_channels_and_have_two_at_least(channels: int) -> None:
    norm = group_norm(channels)
    assert channels % norm.num_groups == 0 and channels >= 2 * norm.num_groups
    assert channels % 64 or norm.num_groups == 32


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"name": "swin_t", "norm": "group"}, "norm has no effect on backbone 'swin_t'"),
        ({"name": "vgg11", "norm": "group"}, "norm has no effect on backbone 'vgg11'"),
        ({"name": "small", "norm": "batch"}, "norm 'batch' has no effect on backbone 'small'"),
        ({"name": "swin_t", "norm": "batch"}, "norm has no effect on backbone 'swin_t'"),
        ({"name": "resnet50vd", "dilation": True}, "torchvision's ResNets, such as resnet50: the"),
        ({"name": "convnext_tiny", "dilation": True}, "is for ResNets, not for backbone 'conv"),
        ({"name": "alexnet"}, "a torchvision network with feature maps"),
        ({"name": "resnet50d"}, "did you mean resnet50vd, "),
        ({"name": "swin_tiny"}, "did you mean swin_t, "),
        ({"name": "?"}, "for example resnet18, convnext_tiny, swin_t, "),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        BackboneConfig.model_validate(settings)
    assert text in str(caught.value)


def test_resnets_of_all_kinds_are_dilated() -> None:
    for name in ("resnext50_32x4d", "wide_resnet50_2"):
        backbone = on_meta(name, dilation=True)
        assert backbone.stage_strides == (4, 8, 16, 16)
        assert backbone(torch.empty(1, 3, 40, 33, device="meta")).shape[2:] == (3, 3)


def test_an_older_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.models, "list_models", lambda module: ["resnet18"])
    with pytest.raises(UserError, match=r"torchvision .* has no 'swin_t': install a newer"):
        build_backbone(BackboneConfig(name="swin_t"))


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_imagenet_weights_arrive(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = torchvisions(name).state_dict()
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda *_a, **_k: theirs
    )
    backbone = build_backbone(BackboneConfig(name=name))
    load_backbone_weights(backbone, "imagenet")
    assert all(torch.equal(x, theirs[key]) for key, x in backbone.state_dict().items())


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_imagenet_weights_of_a_resnet_vd_are_timms(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = timm.create_model("resnet18d", pretrained=False)
    asked = []

    def build(name: str, *, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        return theirs

    monkeypatch.setattr(timm_weights, "build_timm", build)
    backbone = build_backbone(BackboneConfig.model_validate({"name": "resnet18vd", "norm": norm}))
    load_backbone_weights(backbone, "imagenet")
    assert asked == [("timm/resnet18d", True)]
    tensors = backbone.state_dict()
    same = [key for key in tensors if not key.startswith("layer1.0.downsample.")]
    assert all(torch.equal(tensors[key], theirs.state_dict()[key]) for key in same)
    maps = torch.randn(1, 64, 4, 4)
    shortcut = backbone.eval().layer1[0].downsample(maps)  # timm's is none
    torch.testing.assert_close(shortcut, maps)


def test_every_network_has_weights_to_start_from() -> None:
    assert not any(from_torchvision(name, {}) for name in TORCHVISION)
