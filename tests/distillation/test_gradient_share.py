"""Distillation's share of the gradient: measured apart, and reached in one change."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_distiller_identities import Build
from torch import Tensor

from d3etr.config.distillation import GradientShareConfig, MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.distiller import Distiller
from d3etr.methods.gradient_share import EVERY, GradientShare, gradients
from d3etr.structures import ImageBatch, Targets

INHERITED = {"method": "d3etr", "inherited_ratio": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "d3etr": {"method": "d3etr"},
    "inherited": INHERITED,
    "kd_detr": {"method": "kd_detr"},
    "qskd": {"method": "qskd"},
}
OFF = {"weight": 0.0}
NO_TERMS = {"prediction": OFF, "self_attention": OFF, "cross_attention": OFF}


def _distiller(tiny_detector: Build, settings: dict[str, Any], **steered: Any) -> Distiller:
    share = {"gradient_share": {"tolerance": 0.0} | steered} if steered else {}
    config = MethodConfig.parse(settings | share)
    student, teacher = tiny_detector(seed=1), tiny_detector()
    return Distiller(student, teacher, config, SetCriterionConfig(), seed=0)


def _backward(
    module: Distiller, images: ImageBatch, targets: Targets, scale: float = 1.0
) -> dict[str, Tensor]:
    module.zero_grad()
    taught = module.run_teacher(images)
    losses = module(images, targets, taught, module.normalisers(targets, taught), scale)
    torch.stack([*losses.values()]).sum().backward()
    return losses


def _watched(module: Distiller, images: ImageBatch, targets: Targets) -> float:
    """The share that the module's controller sees."""
    assert module.share is not None
    _backward(module, images, targets, 0.0)
    detection = [gradient.clone() for gradient in gradients(module.student)]
    _backward(module, images, targets)
    module.share.watch(module.student, detection)
    part, whole = module.share.seen.tolist()
    return part / whole


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_part_of_the_methods_losses_parameter_by_parameter(
    tiny_detector: Build, images: ImageBatch, targets: Targets, method: str
) -> None:
    module = _distiller(tiny_detector, METHODS[method], target=0.5)
    found = _watched(module, images, targets)
    taught = module.run_teacher(images)
    losses = module(images, targets, taught, module.normalisers(targets, taught))
    ground_truth = ("detection/", "auxiliary/")
    sums = [0.0, 0.0]
    for supervised in (True, False):
        chosen = [x for name, x in losses.items() if name.startswith(ground_truth) == supervised]
        parameters = [*module.student.parameters()]
        total = torch.stack(chosen).sum()
        parts = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        for part in parts:
            if part is not None:
                sums[supervised] += part.abs().sum().item()
    assert found == pytest.approx(sums[0] / sum(sums), rel=1e-4)


@pytest.mark.parametrize("target", [0.1, 0.45])
@pytest.mark.parametrize("method", METHODS)
def test_one_change_reaches_the_target(
    tiny_detector: Build, images: ImageBatch, targets: Targets, method: str, target: float
) -> None:
    module = _distiller(tiny_detector, METHODS[method], target=target)
    before = _watched(module, images, targets)
    assert module.share is not None and abs(before - target) > 0.01
    text = module.share.change()
    assert text is not None and text.startswith(f"distillation has {100 * before:.1f} % of the")
    assert _watched(module, images, targets) == pytest.approx(target, rel=1e-3)


def test_the_factor_weighs_the_methods_losses_and_no_others(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    plain = _backward(_distiller(tiny_detector, METHODS["d3etr"]), images, targets)
    module = _distiller(tiny_detector, METHODS["d3etr"], target=0.5)
    assert module.share is not None
    same = _backward(module, images, targets)
    module.share.factor.fill_(3.0)
    steered = _backward(module, images, targets)
    for name, loss in plain.items():
        factor = 3 if name.startswith(("adaptive/", "fixed/")) else 1
        assert same[name].item() == loss.item()
        assert steered[name].item() == pytest.approx(factor * loss.item(), rel=1e-6), name


def test_which_steps_are_measured() -> None:
    share = GradientShare(GradientShareConfig(target=0.5, until=0.5), every_steps=2)
    steps = 8 * EVERY
    measured = [step for step in range(steps) if share.needs_detection(step, steps)]
    assert measured == [0, 2 * EVERY]


def test_a_share_of_nothing_is_refused() -> None:
    share = {"gradient_share": {"target": 0.5}}
    with pytest.raises(ValidationError, match="gradient_share has no effect: all term weights"):
        MethodConfig.parse({"method": "d3etr"} | NO_TERMS | share)
    with pytest.raises(ValidationError, match="has no effect on method 'none'"):
        MethodConfig.parse({"method": "none"} | share)
