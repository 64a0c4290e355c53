"""Timm's networks as backbones: maps, norms, weights of timm and of EfficientNet-Lite's port."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from port_names import as_the_port
from torch import nn

from d3etr.config.backbone import BackboneConfig
from d3etr.detectors import timm_weights
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.timm_backbone import TimmBackbone
from d3etr.detectors.timm_weights import INNER, from_timm
from d3etr.detectors.weights import load_backbone_weights, load_strictly, write_tensors
from d3etr.errors import UserError

LITE = "timm/tf_efficientnet_lite0"


def built(name: str, **settings: object) -> TimmBackbone:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig.model_validate({"name": name, **settings}))
    assert isinstance(backbone, TimmBackbone)
    return backbone.eval()


def random_statistics(network: nn.Module) -> None:
    for key, tensor in network.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1)
        elif key.endswith("running_mean"):
            tensor.normal_(std=0.1)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        (LITE, (24, 40, 112, 320)),
        ("timm/resnet10t", (64, 128, 256, 512)),
        ("timm/convnext_atto", (40, 80, 160, 320)),
        ("timm/hgnetv2_b0", (64, 256, 512, 1024)),
    ],
)
def test_maps_are_those_of_timms_own_features(name: str, channels: tuple[int, ...]) -> None:
    plain = name.removeprefix("timm/")
    theirs = timm.create_model(plain, pretrained=False).eval().double()
    random_statistics(theirs)
    ours = built(name).double()
    load_strictly(ours, from_timm(ours, theirs.state_dict(), for_our_pixels=True), name)
    assert (ours.stage_channels, ours.stage_strides) == (channels, (4, 8, 16, 32))
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    reference = timm.create_model(plain, pretrained=False, features_only=True).eval().double()
    strides = reference.feature_info.reduction()
    named = {key.replace(".", "_"): value for key, value in theirs.state_dict().items()}
    state = {key: named[key.replace(".", "_")] for key in reference.state_dict()}
    reference.load_state_dict(state)
    with torch.no_grad():
        expected = [m for m, s in zip(reference(pixels), strides, strict=True) if s >= 4]
        for found, wanted in zip(ours.pyramid(pixels, 4), expected, strict=True):
            assert (found - wanted).abs().max() < 1e-12 * wanted.abs().max()


def test_maps_are_rounded_up() -> None:
    maps = built(LITE).pyramid(torch.zeros(1, 3, 75, 33), 4)
    assert [m.shape[-2:] for m in maps] == [(19, 9), (10, 5), (5, 3), (3, 2)]


def test_norms_are_frozen_or_groups() -> None:
    frozen, groups = built(LITE), built(LITE, norm="group")
    assert not any(isinstance(m, nn.BatchNorm2d) for b in (frozen, groups) for m in b.modules())
    trained = {name.rpartition(".")[0] for name, _ in frozen.named_parameters()}
    assert not any(".bn" in name for name in trained)
    assert any(".bn" in name for name, _ in groups.named_parameters())
    pixels = torch.randn(1, 3, 32, 32)
    assert groups(pixels).shape == frozen(pixels).shape
    batches = built(LITE, norm="batch")
    assert {*batches.state_dict()} == {*frozen.state_dict()}
    batches.load_state_dict(frozen.state_dict())
    assert any(".bn" in name for name, _ in batches.named_parameters())
    torch.testing.assert_close(batches(pixels), frozen(pixels), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="norm 'group' has no effect on timm/poolformer"):
        built("timm/poolformer_s12", norm="group")


def test_frozen_stages_begin_at_the_stem() -> None:
    names = [name for name, _ in built(LITE, norm="group").named_parameters()]
    counts = []
    for stages in range(4):
        backbone = built(LITE, norm="group", frozen_stages=stages)
        state = [p.requires_grad for p in backbone.parameters()]
        assert state == sorted(state)
        counts.append(state.index(True))
    assert counts[0] == 0
    assert names[counts[1] - 1].startswith("network.blocks.0.")
    assert names[counts[2] - 1].startswith("network.blocks.1.")
    assert names[counts[3] - 1].startswith("network.blocks.2.")


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("timm/vgg11", [4, 8, 12, 16, 16]),  # whose stages end in a step without parameters
        ("timm/densenet121", [1, 13, 38, 87, 120]),  # the last in a norm, frozen anyway
    ],
)
def test_stages_end_with_a_step_without_parameters(name: str, counts: list[int]) -> None:
    for stages, count in enumerate(counts, start=1):
        with torch.device("meta"):
            backbone = built(name, frozen_stages=stages)
        state = [p.requires_grad for p in backbone.parameters()]
        assert state == sorted(state)
        assert state.count(False) == count


def test_frozen_stages_of_a_network_without_names_of_its_stages_are_refused() -> None:
    with torch.device("meta"):
        assert all(p.requires_grad for p in built("timm/mvitv2_tiny").parameters())
        with pytest.raises(UserError, match="timm does not say which parts of timm/mvitv2_tiny"):
            built("timm/mvitv2_tiny", frozen_stages=2)


def test_every_parameter_takes_part() -> None:
    backbone = built("timm/resnet10t", norm="group")
    sum(m.sum() for m in backbone.pyramid(torch.randn(1, 3, 64, 64), 4)).backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("timm/efficientnet_lite9", "did you mean timm/efficientnet_lite"),
        ("timm/mixer_s32_224", "no maps of several resolutions"),
        ("timm/efficientvit_b0", "no maps of several resolutions"),  # it insists on its pooling
    ],
)
def test_unknown_networks_are_refused(name: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        built(name)


def test_the_ports_file_gives_what_its_network_gives_for_its_own_pixels(tmp_path: Path) -> None:
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    random_statistics(theirs)
    torch.save(as_the_port(theirs), tmp_path / "lite0.pth")
    target = tmp_path / "lite0.safetensors"
    imported = import_weights(tmp_path / "lite0.pth", target, backbone=BackboneConfig(name=LITE))
    assert imported.kind == "a network of timm"
    ours = built(LITE)
    load_backbone_weights(ours, target)
    image = torch.rand(1, 3, 256, 256)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        pixels = (image - mean[:, None, None]) / std[:, None, None]
        found = ours.pyramid(pixels, 4)[1][0, :, 12:-12, 12:-12]
        wanted = theirs.forward_intermediates(
            (255 * image - 127) / 128, indices=[2], intermediates_only=True
        )[0][0, :, 12:-12, 12:-12]
    # Only cells that see the padded border differ: zero is another colour there.
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_ports_file_is_refused_for_another_network() -> None:
    with pytest.raises(UserError, match="expected timm/tf_efficientnet_lite0 to 4"):
        from_timm(built("timm/resnet10t"), {"_conv_stem.weight": torch.zeros(1)})


@pytest.mark.parametrize("name", [LITE, "timm/convnext_atto"])
def test_downloaded_weights_and_timms_file_are_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = timm.create_model(name.removeprefix("timm/"), pretrained=False)
    random_statistics(theirs)
    write_tensors(tmp_path / "timm.safetensors", theirs.state_dict(), {})
    monkeypatch.setattr(timm_weights, "build_timm", lambda name, pretrained: theirs)
    downloaded, read = built(name), built(name)
    load_backbone_weights(downloaded, "imagenet")
    load_backbone_weights(read, tmp_path / "timm.safetensors")
    for key, tensor in read.state_dict().items():
        assert torch.equal(downloaded.state_dict()[key], tensor)


def test_our_own_files_are_read_as_they_are(tmp_path: Path) -> None:
    backbone = built(LITE)
    assert all(name.startswith(INNER) for name in backbone.state_dict())
    write_tensors(tmp_path / "ours.safetensors", backbone.state_dict(), {})
    load_backbone_weights(built(LITE), tmp_path / "ours.safetensors")


def test_images_of_a_size_that_a_network_does_not_take_are_refused() -> None:
    with torch.device("meta"):
        backbone = built("timm/swin_tiny_patch4_window7_224")
        assert backbone(torch.zeros(1, 3, 224, 224)).shape == (1, 768, 7, 7)
        with pytest.raises(UserError, match=r"images of 96 x 64 pixels.*doesn't match model"):
            backbone(torch.zeros(1, 3, 64, 80))
