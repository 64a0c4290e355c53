import copy
import logging

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from tiny import tiny_detector_config
from torch import Tensor, nn
from torch.optim import AdamW

from d3etr.config.backbone import BackboneConfig
from d3etr.config.training import OptimisationConfig
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.build import build_detector
from d3etr.engine.optimiser import (
    build_optimiser,
    clip_gradients,
    inherited_factor,
    parameter_groups,
    restore_optimiser,
    set_learning_rates,
)


def detector() -> nn.Module:
    module = nn.Module()
    module.backbone = nn.Linear(3, 2)
    module.head = nn.Linear(2, 1)
    return module


def optimisation(**settings: float) -> OptimisationConfig:
    rates = {"learning_rate": 0.1, "backbone_rate_factor": 0.1}
    return OptimisationConfig(steps=1, **(rates | settings))


def test_backbone_and_rest_have_their_own_rates() -> None:
    module = detector()
    rest, backbone = parameter_groups(module, module.backbone, optimisation())
    assert (rest["lr"], backbone["lr"]) == pytest.approx((0.1, 0.01))
    assert {id(p) for p in backbone["params"]} == {id(p) for p in module.backbone.parameters()}
    assert {id(p) for p in rest["params"]} == {id(p) for p in module.head.parameters()}


def test_what_says_where_to_sample_may_have_a_third_rate() -> None:
    config = tiny_detector_config(name="deformable_detr", width=32, levels=2, points=2)
    detector = build_detector(config, 3)
    rates = optimisation(sampling_rate_factor=0.01)
    *_, sampling = parameter_groups(
        detector, detector.backbone, rates, detector.config.sampling_parts
    )
    names = {id(p): name for name, p in detector.named_parameters()}
    found = {names[id(p)].rsplit(".", 1)[0] for p in sampling["params"]}
    assert sampling["lr"] == pytest.approx(0.001)
    assert found == {
        "encoder.layers.0.attention.offsets",
        "decoder.layers.0.cross_attention.offsets",
        "decoder.layers.1.cross_attention.offsets",
        "reference_head",
    }
    assert len(parameter_groups(detector, detector.backbone, optimisation())) == 2


def factors(backbone: nn.Module, **settings: float) -> dict[str, float]:
    """Learning rate of each parameter over that of the rest, by name."""
    module = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(2, 1)})
    groups = parameter_groups(module, backbone, optimisation(**settings))
    rates = {id(p): group["lr"] / 0.1 for group in groups for p in group["params"]}
    assert len(rates) == len(list(module.parameters()))
    return {name: rates[id(p)] for name, p in backbone.named_parameters()}


@pytest.mark.parametrize("kind", ["dinov2", "lw_detr"])
def test_layers_of_a_vision_transformer_decay_as_in_lw_detrs_code(kind: str) -> None:
    def official(name: str, blocks: int = 3) -> float:
        embeds = ("patches", "positions", "class_token")
        block = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else blocks + 1
        return float(0.8 ** (blocks + 1 - (0 if name.startswith(embeds) else block)))

    settings = {"kind": kind, "width": 8, "blocks": 3, "heads": 2, "outputs": [3], "whole": []}
    config = {"name": "vit", "vit": settings}
    backbone = build_backbone(BackboneConfig.model_validate(config, strict=False))
    found = factors(backbone, layer_decay=0.8, backbone_rate_factor=0.5)
    assert found == pytest.approx({name: 0.5 * official(name) for name in found})
    assert found["blocks.2.query.weight"] == pytest.approx(0.5 * 0.8)
    assert found["positions"] == pytest.approx(0.5 * 0.8**4)
    assert set(factors(backbone, backbone_rate_factor=0.5).values()) == {0.05 / 0.1}


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_dinov3_qkvb"])
def test_layers_of_timms_vision_transformers_decay_as_timms_own(name: str) -> None:
    backbone = build_backbone(BackboneConfig(name=f"timm/{name}"))
    found = factors(backbone, layer_decay=0.7, backbone_rate_factor=1.0)
    theirs = timm.create_model(name, pretrained=False, num_classes=2)
    names = {id(p): f"network.{name}" for name, p in theirs.named_parameters()}
    groups = param_groups_layer_decay(theirs, layer_decay=0.7)
    expected = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    ends = [name for name in found if name.startswith("network.norm.")]
    assert [found.pop(name) for name in ends] == [1.0, 1.0]  # theirs counts it with the last block
    assert found == pytest.approx({name: expected[name] for name in found})


def test_a_part_of_the_layers_may_be_frozen() -> None:
    backbone = build_backbone(BackboneConfig(name="timm/test_vit", frozen_stages=2))
    module = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(2, 1)})
    groups = parameter_groups(module, backbone, optimisation(layer_decay=0.5))
    rates = [0.1, *(0.01 * 0.5**steps for steps in range(6))]  # the rest, the norm, blocks 6 to 2
    assert [group["lr"] for group in groups] == pytest.approx(rates)


def test_a_backbone_rate_of_zero_freezes_the_backbone_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = detector()
    with caplog.at_level(logging.INFO):
        groups = parameter_groups(module, module.backbone, optimisation(backbone_rate_factor=0.0))
    assert len(groups) == 1
    assert not any(p.requires_grad for p in module.backbone.parameters())
    assert "frozen" in caplog.text


def test_inherited_parameters_have_groups_of_their_own_while_they_are_slowed() -> None:
    module = detector()
    inherited = frozenset({id(module.head.weight), id(module.backbone.bias)})
    assert len(build_optimiser(module, module.backbone, optimisation()).param_groups) == 2
    config = optimisation(inherited_rate_factor=0.5, inherited_warmup_steps=3)
    optimiser = build_optimiser(module, module.backbone, config, inherited=inherited)
    assert [inherited_factor(step, config) for step in (0, 2, 3)] == [0.5, 0.5, 1.0]
    set_learning_rates(optimiser, 0.1, 0.5)
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    assert rates == {
        id(module.head.weight): pytest.approx(0.005),
        id(module.head.bias): pytest.approx(0.01),
        id(module.backbone.weight): pytest.approx(0.001),
        id(module.backbone.bias): pytest.approx(0.0005),
    }


def test_the_schedule_multiplies_every_groups_own_rate() -> None:
    module = detector()
    optimiser = build_optimiser(module, module.backbone, optimisation())
    set_learning_rates(optimiser, 0.5)
    set_learning_rates(optimiser, 0.5)  # of the base rate, not of the last one
    assert [g["lr"] for g in optimiser.param_groups] == pytest.approx([0.05, 0.005])


@pytest.mark.parametrize("maximum", [0.5, None])
def test_clipping_scales_all_gradients_to_the_common_norm(maximum: float | None) -> None:
    module = detector()
    optimiser = build_optimiser(module, module.backbone, optimisation())
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    norm = clip_gradients(optimiser, maximum)
    count = sum(p.numel() for p in module.parameters())
    after = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
    assert float(norm) == pytest.approx(count**0.5)
    assert float(after) == pytest.approx(maximum or count**0.5, rel=1e-4)


def test_moments_that_lie_otherwise_in_memory_are_restored_in_their_place() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    module = nn.ModuleDict({"backbone": convolution, "head": nn.Linear(2, 2)})
    config = OptimisationConfig(epochs=1)
    gradients = [torch.randn_like(p) for p in module.parameters()]

    def step(optimiser: AdamW, of: nn.Module) -> list[Tensor]:
        for parameter, gradient in zip(of.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimiser.step()
        return [p.detach().clone() for p in of.parameters()]

    first = build_optimiser(module, convolution, config)
    step(first, module)
    twin = copy.deepcopy(module)
    state = copy.deepcopy(first.state_dict())
    for moments in state["state"].values():
        moments.update({name: value.contiguous() for name, value in moments.items()})
    second = build_optimiser(twin, twin["backbone"], config)
    restore_optimiser(second, state)
    for ours, expected in zip(step(second, twin), step(first, module), strict=True):
        assert torch.equal(ours, expected)
