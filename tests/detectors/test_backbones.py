"""Backbones: shapes, dilation, freezing, and where weights come from."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from pydantic import ValidationError
from torchvision.ops import FrozenBatchNorm2d

from d3etr.config.backbone import BackboneConfig
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.frozen_norms import FrozenNorm, FusedFrozenBatchNorm2d, NormedConv2d
from d3etr.detectors.small_backbone import StridedShortcut
from d3etr.detectors.weights import load_backbone_weights, write_tensors
from d3etr.errors import UserError

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SMALL = BackboneConfig(name="small", stem_width=8, stage_widths=(8, 16))


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("dilation", [False, True])
def test_every_resnet_has_the_stride_it_says(name: str, dilation: bool) -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name=name, dilation=dilation))
        features = backbone(torch.empty(2, 3, 100, 64))
    stride = 16 if dilation else 32
    assert backbone.stride == stride
    assert features.shape == (2, backbone.channels, -(-100 // stride), 64 // stride)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 50), (1, 1)])
def test_small_backbone_rounds_up(height: int, width: int) -> None:
    backbone = build_backbone(SMALL)
    features = backbone(torch.randn(2, 3, height, width))
    assert backbone.stride == 4
    assert features.shape == (2, 16, -(-height // 4), -(-width // 4))


@pytest.mark.parametrize("inputs", [8, 16])
def test_a_strided_shortcut_is_a_strided_convolution(inputs: int) -> None:
    torch.manual_seed(0)
    ours = StridedShortcut(inputs, 16, 1, 2, bias=False)
    pixels = torch.randn(2, inputs, 7, 6)
    expected, mine = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    theirs = torch.nn.functional.conv2d(expected, ours.weight, stride=2)
    theirs.square().sum().backward()
    gradient, ours.weight.grad = ours.weight.grad, None
    output = ours(mine)
    output.square().sum().backward()
    torch.testing.assert_close(output, theirs)
    torch.testing.assert_close(mine.grad, expected.grad)
    torch.testing.assert_close(ours.weight.grad, gradient)


def test_gradients_of_a_narrow_backbone_stay_inside_their_memory() -> None:
    """The C library aborts when it meets damaged memory; a few steps are enough."""
    code = (
        "import torch; from d3etr.config.backbone import BackboneConfig; "
        "from d3etr.detectors.small_backbone import SmallBackbone; "
        "torch.set_num_threads(1); torch.manual_seed(0); "
        "net = SmallBackbone(BackboneConfig(name='small', stem_width=8, stage_widths=(8, 8, 16))); "
        "[net(torch.randn(8, 3, 64, 64)).sum().backward() for _ in range(30)]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_more_blocks_deepen_every_stage_of_the_small_backbone() -> None:
    deeper = build_backbone(SMALL.model_copy(update={"stage_blocks": 3}))
    assert len(deeper.blocks) == 3 * len(build_backbone(SMALL).blocks)


def test_dilated_bottlenecks_equal_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    tensors = {n: t for n, t in theirs.state_dict().items() if not n.startswith("fc.")}
    ours = build_backbone(BackboneConfig(name="resnet50", dilation=True))
    ours.load_state_dict({n: t for n, t in tensors.items() if "num_batches" not in n})
    pixels = torch.randn(1, 3, 64, 64)
    stages = (theirs.conv1, theirs.bn1, theirs.relu, theirs.maxpool)
    stages += (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)
    with torch.no_grad():
        expected = torch.nn.Sequential(*stages).eval()(pixels)
        scale = expected.abs().max()
        torch.testing.assert_close(ours(pixels) / scale, expected / scale, atol=1e-5, rtol=0)


def test_fused_frozen_norm_equals_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = FrozenBatchNorm2d(6)
    for buffer in theirs.buffers():
        buffer.uniform_(0.5, 2)
    ours = FusedFrozenBatchNorm2d(6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(ours.train()(x), theirs(x))


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_takes_the_frozen_norm_behind_it_up(bias: bool) -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 6, 3, 2, 1, bias=bias).double()
    theirs = FrozenBatchNorm2d(6).double()
    for buffer in theirs.buffers():
        buffer.uniform_(0.5, 2)
    norm = FrozenNorm(6, theirs.eps).double()
    ours = torch.nn.Sequential(NormedConv2d(copy.deepcopy(convolution), norm), norm)
    ours[1].load_state_dict(theirs.state_dict())
    ours = copy.deepcopy(ours)  # the copy's convolution knows the copy's norm
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    expected, found = theirs(convolution(x)), ours(x)
    torch.testing.assert_close(found, expected)
    for output in (expected, found):
        output.square().sum().backward()
    for name, parameter in convolution.named_parameters():
        torch.testing.assert_close(ours[0].get_parameter(name).grad, parameter.grad)
    norm.scale.zero_()
    torch.testing.assert_close(ours(x), found)


def _normed(seed: int) -> torch.nn.Sequential:
    """A convolution that is not trained and its frozen norm."""
    torch.manual_seed(seed)
    norm = FrozenNorm(6, 1e-5)
    normed = torch.nn.Sequential(NormedConv2d(torch.nn.Conv2d(3, 6, 3, bias=False), norm), norm)
    normed.load_state_dict({name: torch.rand_like(x) for name, x in normed.state_dict().items()})
    return normed.requires_grad_(False)


def _require_current_weights(normed: torch.nn.Sequential) -> torch.Tensor:
    """Returns the product that is kept."""
    x = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        maps, shift = normed[0].unshifted(x)
        torch.testing.assert_close(maps + shift[:, None, None], normed(x))
    return normed[0]._kept._products[torch.float32]


@torch.no_grad()
def test_weights_that_nobody_trains_are_scaled_once_and_never_stale() -> None:
    normed, other = _normed(0), _normed(1)
    product = _require_current_weights(normed)
    assert _require_current_weights(normed) is product
    changes = {
        "in place": lambda: normed[0].weight.mul_(2),
        "another memory": lambda: setattr(normed[0].weight, "data", other[0].weight.clone()),
        "a list of them": lambda: torch._foreach_add_([normed[0].weight.detach()], 1.0),
        "state": lambda: normed.load_state_dict(other.state_dict()),
        "assigned state": lambda: normed.load_state_dict(_normed(2).state_dict(), assign=True),
        "precision": lambda: normed.double().float(),
        "scale": lambda: normed[1].scale.add_(1),
    }
    for name, change in changes.items():
        before = product.clone()
        change()
        assert _require_current_weights(normed) is product, name
        assert name == "precision" or not torch.equal(product, before), name
    with torch.autocast("cpu", torch.bfloat16):
        assert normed[0].unshifted(torch.randn(1, 3, 8, 8))[0].dtype == torch.bfloat16
    assert normed[0]._kept._products[torch.float32] is product
    _require_current_weights(normed)


def test_kept_weights_leave_training_and_copies_alone() -> None:
    normed = _normed(0)
    with torch.inference_mode():
        _require_current_weights(normed)
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    normed[0].unshifted(x)[0].sum().backward()
    assert x.grad is not None
    copied = copy.deepcopy(normed)
    assert not copied[0]._kept._products
    with torch.no_grad():
        copied[0].weight.zero_()
    _require_current_weights(copied)
    _require_current_weights(normed)
    normed.requires_grad_(True)
    normed[0].unshifted(x)[0].sum().backward()
    assert normed[0].weight.grad is not None
    with torch.inference_mode():
        built_there = _normed(3)[0]
        assert built_there.unshifted(torch.randn(1, 3, 8, 8))[0].isfinite().all()


def test_group_norm_resnet_has_no_frozen_statistics() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet18", norm="group"))
    assert not list(backbone.buffers())
    assert backbone(torch.randn(1, 3, 32, 32)).shape == (1, 512, 1, 1)


def test_frozen_stages_freeze_from_the_stem_on() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet18", norm="group", frozen_stages=2))
    frozen = {name.split(".")[0] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}


def test_a_backbone_that_is_not_trainable_is_frozen_whole() -> None:
    backbone = build_backbone(SMALL.model_copy(update={"trainable": False}))
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_settings_of_the_other_kind_are_refused() -> None:
    with pytest.raises(
        ValidationError, match="frozen_stages is for networks of torchvision and timm"
    ):
        BackboneConfig(name="small", frozen_stages=1)
    with pytest.raises(ValidationError, match="dilation"):
        BackboneConfig(name="small", dilation=True)


def test_weights_from_a_file_arrive(tmp_path: Path) -> None:
    source, target = build_backbone(SMALL), build_backbone(SMALL)
    path = tmp_path / "backbone.safetensors"
    write_tensors(path, source.state_dict(), {})
    load_backbone_weights(target, path)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


def test_missing_left_over_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    tensors = build_backbone(SMALL).state_dict()
    del tensors["stem.0.weight"]
    tensors["extra"] = torch.zeros(1)
    tensors["stem.1.bias"] = torch.zeros(3)
    path = tmp_path / "backbone.safetensors"
    write_tensors(path, tensors, {})
    backbone = build_backbone(SMALL)
    before = backbone.state_dict()["blocks.0.norm1.weight"].clone()
    with pytest.raises(UserError) as caught:
        load_backbone_weights(backbone, path)
    for part in (str(path), "missing: stem.0.weight", "left over: extra", "stem.1.bias ([3]"):
        assert part in str(caught.value)
    assert torch.equal(backbone.state_dict()["blocks.0.norm1.weight"], before)


def test_imagenet_needs_a_resnet_with_batch_norm() -> None:
    with pytest.raises(UserError, match=r"'small'.*pretrain-backbone"):
        load_backbone_weights(build_backbone(SMALL), "imagenet")
    grouped = build_backbone(BackboneConfig(name="resnet18", norm="group"))
    with pytest.raises(UserError, match="norm 'group'"):
        load_backbone_weights(grouped, "imagenet")


def test_imagenet_offline_says_where_to_put_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_args: object, **_kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(UserError) as caught:
        load_backbone_weights(build_backbone(BackboneConfig(name="resnet18")), "imagenet")
    for part in ("no network", "resnet18-f37072fd.pth", "checkpoints", "backbone_weights"):
        assert part in str(caught.value)


def test_imagenet_weights_fit_without_their_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda *_a, **_k: theirs
    )
    backbone = build_backbone(BackboneConfig(name="resnet18"))
    load_backbone_weights(backbone, "imagenet")
    assert torch.equal(backbone.conv1.weight, theirs["conv1.weight"])
