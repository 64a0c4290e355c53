"""AdamW with one learning rate, and factors on it for the backbone and for sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from d3etr.config.training import OptimisationConfig, Precision
from d3etr.logs import get_logger

logger = get_logger(__name__)


def parameter_groups(
    module: nn.Module,
    backbone: nn.Module,
    config: OptimisationConfig,
    sampling_parts: frozenset[str] = frozenset(),
) -> list[dict[str, object]]:
    """Split what is trained into backbone, modules that predict sampling locations, and the rest.

    Everything decays alike, biases and norms included, as in DETR's own training code: with
    its small weight decay the choice is not measurable, and results stay comparable.

    Args:
        module: everything that is trained.
        backbone: the part of it with ``backbone_rate_factor``.
        config: the rates. A backbone's factor of 0 freezes the backbone (as in DETR), which also
            saves its backward pass.
        sampling_parts: names of the modules that predict sampling locations, from the detector's
            configuration.

    Returns:
        Groups for ``AdamW``; ``base_rate`` is the rate before any schedule.

    Raises:
        ValueError: nothing is left to train.
    """
    if config.backbone_rate_factor == 0 and any(p.requires_grad for p in backbone.parameters()):
        logger.info("backbone_rate_factor is 0: the backbone is frozen")
        backbone.requires_grad_(False)
    inside = {id(p) for p in backbone.parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter is trained")
    sampling = set() if config.sampling_rate_factor == 1 else _sampling(module, sampling_parts)
    parts = [
        ([p for p in trained if id(p) not in inside | sampling], 1.0),
        ([p for p in trained if id(p) in inside], config.backbone_rate_factor),
        ([p for p in trained if id(p) in sampling], config.sampling_rate_factor),
    ]
    rates = [(parameters, factor * config.learning_rate) for parameters, factor in parts]
    return [
        {"params": parameters, "lr": rate, "base_rate": rate}
        for parameters, rate in rates
        if parameters
    ]


def _sampling(module: nn.Module, names: frozenset[str]) -> set[int]:
    """Ids of the parameters of the modules of these names."""
    return {
        id(parameter) for name, parameter in module.named_parameters() if names & {*name.split(".")}
    }


def build_optimiser(
    module: nn.Module,
    backbone: nn.Module,
    config: OptimisationConfig,
    sampling_parts: frozenset[str] = frozenset(),
) -> AdamW:
    """AdamW over ``parameter_groups``, in its fused form where device and type have one."""
    groups = parameter_groups(module, backbone, config, sampling_parts)
    parameters = [p for p in module.parameters() if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return AdamW(groups, weight_decay=config.weight_decay, fused=fused)


def restore_optimiser(optimiser: AdamW, state: dict[str, Any]) -> None:
    """Continue from a saved state.

    Args:
        optimiser: over the parameters that were saved.
        state: its ``state_dict``.
    """
    optimiser.load_state_dict(state)
    for parameter, moments in optimiser.state.items():
        for name, value in moments.items():
            # The fused step takes for granted that moments lie in memory as their parameter does;
            # where they do not, it mixes up their elements without a word.
            if value.dim() and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def set_learning_rates(optimiser: AdamW, factor: float) -> None:
    """Multiply every group's base rate by ``factor``."""
    for group in optimiser.param_groups:
        group["lr"] = group["base_rate"] * factor


def clip_gradients(optimiser: AdamW, maximum: float | None) -> Tensor:
    """Scale all gradients so that their common L2 norm is at most ``maximum``.

    Args:
        optimiser: of the parameters.
        maximum: None only measures.

    Returns:
        Scalar: the norm before clipping, left on the device.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    if maximum is None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients, foreach=True)
    return torch.nn.utils.clip_grad_norm_(parameters, maximum, foreach=True)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Forward passes run in this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
