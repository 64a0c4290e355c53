"""What follows a convolution, in one kernel, against the operations it stands for."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from d3etr.config.backbone import BackboneConfig
from d3etr.detectors.backbones import Backbone, build_backbone
from d3etr.detectors.frozen_norms import FrozenNorm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SWITCH = "d3etr.detectors.frozen_norms.runs_kernels"


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too, where two paths may choose different algorithms."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class _Case(NamedTuple):
    x: Tensor
    weight: Tensor
    shift: Tensor
    identity: Tensor | None
    gradient: Tensor


def _case(shape: tuple[int, int, int, int], beside: bool, dtype: torch.dtype) -> _Case:
    torch.manual_seed(0)
    batch, channels, height, width = shape

    def maps(count: int) -> Tensor:
        values = torch.randn(batch, count, height, width, device=DEVICE, dtype=dtype)
        return values.contiguous(memory_format=torch.channels_last)

    x = maps(3).requires_grad_()
    weight = torch.randn(channels, 3, 1, 1, device=DEVICE, dtype=dtype)
    weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
    shift = torch.randn(channels, device=DEVICE)
    identity = maps(channels).requires_grad_() if beside else None
    return _Case(x, weight, shift, identity, maps(channels))


def _plain(case: _Case) -> Tensor:
    total = torch.nn.functional.conv2d(case.x, case.weight).float() + case.shift[:, None, None]
    if case.identity is not None:
        total = total + case.identity
    return total.relu().to(case.x.dtype)


def _fused(case: _Case) -> Tensor:
    from d3etr.kernels.epilogue import shift_and_rectify

    maps = torch.nn.functional.conv2d(case.x, case.weight)
    found = shift_and_rectify(maps, case.shift, case.identity)
    assert found.data_ptr() == maps.data_ptr()
    return found


def _gradients(case: _Case, output: Tensor) -> tuple[Tensor, ...]:
    trained = [x for x in (case.x, case.weight, case.identity) if x is not None]
    return torch.autograd.grad(output, trained, case.gradient)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 8, 4, 3), (1, 7, 5, 3), (2, 96, 11, 5), (3, 1, 2, 2), (2, 5, 1, 1)]
)
def test_values_and_gradients_are_those_of_plain_operations(
    shape: tuple[int, int, int, int], beside: bool
) -> None:
    case = _case(shape, beside, torch.float32)
    expected, found = _plain(case), _fused(case)
    torch.testing.assert_close(found, expected)
    assert found.numel() < 100 or ((found == 0).any() and (found > 0).any())
    for ours, theirs in zip(_gradients(case, found), _gradients(case, expected), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("shape", [(4, 256, 40, 40), (3, 24, 17, 9)])
def test_bfloat16_is_rounded_once(shape: tuple[int, int, int, int], beside: bool) -> None:
    case = _case(shape, beside, torch.bfloat16)
    expected, found = _plain(case), _fused(case)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, expected)
    for ours, theirs in zip(_gradients(case, found), _gradients(case, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01 * float(theirs.abs().max()))


def test_a_gradient_may_lie_otherwise_than_its_maps() -> None:
    case = _case((2, 6, 4, 3), True, torch.float32)
    for gradient in (case.gradient.contiguous(), case.gradient[..., :1].expand(-1, -1, -1, 3)):
        case = case._replace(gradient=gradient)
        pairs = zip(_gradients(case, _fused(case)), _gradients(case, _plain(case)), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["channels first", "double", "empty", "identity first"])
def test_other_maps_take_the_plain_operations(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from d3etr.kernels import epilogue

    monkeypatch.delattr(epilogue, "_ShiftAndRectify")
    maps = torch.randn(0 if kind == "empty" else 2, 3, 4, 5, device=DEVICE)
    identity = torch.randn_like(maps)
    if kind != "channels first":
        maps = maps.contiguous(memory_format=torch.channels_last)
    if kind == "double":
        maps, identity = maps.double(), identity.double()
    if kind != "identity first":
        identity = identity.contiguous(memory_format=torch.channels_last)
    shift = torch.randn(3, device=DEVICE)
    expected = (maps + shift[:, None, None] + identity).relu()
    torch.testing.assert_close(epilogue.shift_and_rectify(maps, shift, identity), expected)


def test_what_is_no_number_stays_none() -> None:
    from d3etr.kernels.epilogue import shift_and_rectify

    maps = torch.tensor([[1.0, torch.nan]], device=DEVICE)[..., None, None]
    assert shift_and_rectify(maps, torch.zeros(2, device=DEVICE)).isnan().sum() == 1


def _backbone(name: str, **settings: object) -> Backbone:
    """With norms that do something."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig.model_validate({"name": name, **settings}))
    for norm in backbone.modules():
        if isinstance(norm, FrozenNorm):
            norm.scale.uniform_(0.3, 0.6)
            norm.shift.normal_(std=0.2)
    return backbone.to(DEVICE)


def _step(backbone: Backbone) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    maps = backbone.pyramid(torch.randn(2, 3, 32, 40, device=DEVICE), 4)
    if any(features.requires_grad for features in maps):
        sum(features.square().mean() for features in maps).backward()
    gradients = {k: p.grad for k, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    return maps, gradients


def _require_same_step(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> int:
    """Fused as without kernels; returns how many parameters have gradients."""
    monkeypatch.setattr(SWITCH, lambda _: False)
    expected_maps, expected = _step(backbone)
    monkeypatch.setattr(SWITCH, lambda _: True)
    maps, gradients = _step(backbone)
    for ours, theirs in zip(maps, expected_maps, strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-4)
    assert gradients.keys() == expected.keys()
    for name, theirs in expected.items():
        # As a whole: what rounding brings to the other side of 0 is rectified, or no more. On some
        # processors that was 1 %.
        assert (gradients[name] - theirs).norm() <= 0.05 * theirs.norm(), name
    return len(gradients)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "resnet18vd"])
def test_backbones_learn_as_without_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = _backbone(name)
    assert _require_same_step(backbone, monkeypatch) == len(list(backbone.parameters()))


def test_frozen_stages_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = _backbone("resnet18", frozen_stages=2)
    trained = _require_same_step(backbone, monkeypatch)
    assert trained == sum(p.requires_grad for p in backbone.parameters())


def test_dilated_and_frozen_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = _backbone("resnet18", dilation=True, trainable=False)
    assert _require_same_step(backbone, monkeypatch) == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_is_the_same(context: type, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = _backbone("resnet18")
    with context():
        _require_same_step(backbone, monkeypatch)


def test_every_convolution_of_a_resnet_is_followed_by_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from d3etr.kernels import epilogue

    backbone, grouped = _backbone("resnet18"), _backbone("resnet18", norm="group")
    pooling = _backbone("resnet18vd")
    calls = []
    original = epilogue.shift_and_rectify

    def counting(maps: Tensor, shift: Tensor, identity: Tensor | None = None) -> Tensor:
        assert epilogue._runs_on(maps) and (identity is None or epilogue._runs_on(identity))
        calls.append(maps.shape)
        return original(maps, shift, identity)

    monkeypatch.setattr(epilogue, "shift_and_rectify", counting)
    monkeypatch.setattr(SWITCH, lambda _: True)
    backbone(torch.randn(1, 3, 32, 32, device=DEVICE))
    assert len(calls) == 1 + 2 * 8  # three more convolutions are shortcuts
    grouped(torch.randn(1, 3, 32, 32, device=DEVICE))
    assert len(calls) == 1 + 2 * 8
    calls.clear()
    pooling(torch.randn(1, 3, 32, 32, device=DEVICE))
    assert len(calls) == 3 + 2 * 8


def test_without_a_gpu_blocks_compute_what_torchvisions_do() -> None:
    from torchvision.models.resnet import BasicBlock, Bottleneck

    for name, kind in (("resnet18", BasicBlock), ("resnet50", Bottleneck)):
        backbone = _backbone(name).cpu()
        x = torch.randn(2, 64, 9, 7).contiguous(memory_format=torch.channels_last)
        for stage in (backbone.layer1, backbone.layer2):
            for block in stage:
                expected = kind.forward(block, x)
                assert type(block) is not kind and torch.equal(block(x), expected)
                x = expected


def test_the_compiler_sees_the_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = _backbone("resnet18")
    monkeypatch.setattr(SWITCH, lambda _: True)
    pixels = torch.randn(1, 3, 32, 32, device=DEVICE)
    compiled = torch.compile(backbone.pyramid, backend="eager", fullgraph=True)
    graphs = torch._dynamo.explain(backbone.pyramid)(pixels, 1).graphs
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert "relu_" in targets and not any("apply" in target for target in targets)
    torch.testing.assert_close(compiled(pixels, 1)[0], backbone(pixels), rtol=1e-4, atol=1e-4)
