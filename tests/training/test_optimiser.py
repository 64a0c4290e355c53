import logging

import pytest
import torch
from torch import nn

from d3etr.config.training import OptimisationConfig
from d3etr.training.optimiser import (
    build_optimiser,
    clip_gradients,
    parameter_groups,
    set_learning_rates,
)


def detector() -> nn.Module:
    module = nn.Module()
    module.backbone = nn.Linear(3, 2)
    module.head = nn.Linear(2, 1)
    return module


def optimisation(**settings: float) -> OptimisationConfig:
    rates = {"learning_rate": 0.1, "backbone_learning_rate": 0.01}
    return OptimisationConfig(steps=1, **(rates | settings))


def test_backbone_and_rest_have_their_own_rates() -> None:
    module = detector()
    rest, backbone = parameter_groups(module, module.backbone, optimisation())
    assert (rest["lr"], backbone["lr"]) == (0.1, 0.01)
    assert {id(p) for p in backbone["params"]} == {id(p) for p in module.backbone.parameters()}
    assert {id(p) for p in rest["params"]} == {id(p) for p in module.head.parameters()}


def test_a_backbone_rate_of_zero_freezes_the_backbone_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = detector()
    with caplog.at_level(logging.INFO):
        groups = parameter_groups(module, module.backbone, optimisation(backbone_learning_rate=0.0))
    assert len(groups) == 1
    assert not any(p.requires_grad for p in module.backbone.parameters())
    assert "frozen" in caplog.text


def test_the_schedule_multiplies_every_groups_own_rate() -> None:
    module = detector()
    optimiser = build_optimiser(module, module.backbone, optimisation())
    set_learning_rates(optimiser, 0.5)
    set_learning_rates(optimiser, 0.5)  # of the base rate, not of the last one
    assert [g["lr"] for g in optimiser.param_groups] == [0.05, 0.005]


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
