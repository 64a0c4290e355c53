"""AdamW with one learning rate, factors on it for the backbone and for sampling, and its schedule.

Learning rates are a pure function of the step, so nothing of them needs saving.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from d3etr.config.training import OptimisationConfig, Precision, ScheduleConfig
from d3etr.detectors.block_depth import layers_of
from d3etr.logs import get_logger

logger = get_logger(__name__)


def parameter_groups(
    module: nn.Module,
    backbone: nn.Module,
    config: OptimisationConfig,
    sampling_parts: frozenset[str] = frozenset(),
    inherited: frozenset[int] = frozenset(),
) -> list[dict[str, object]]:
    """Split what is trained into backbone, modules that predict sampling locations, and the rest.

    With ``layer_decay`` the backbone is split by layers. Each part is two where some of it was
    inherited and is slowed at first.

    Everything decays alike, biases and norms included, as in DETR's own training code: with
    its small weight decay the choice is not measurable, and results stay comparable.

    Args:
        module: everything that is trained.
        backbone: the part of it with ``backbone_rate_factor``.
        config: the rates. A backbone's factor of 0 freezes the backbone (as in DETR), which also
            saves its backward pass.
        sampling_parts: names of the modules that predict sampling locations, from the detector's
            configuration.
        inherited: ids of parameters that began as another detector's.

    Returns:
        Groups for ``AdamW``; ``base_rate`` is the rate before any schedule, ``inherited`` is True
        for what ``inherited_rate_factor`` is about.

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
    named = () if config.sampling_rate_factor == 1 else module.named_parameters()
    sampling = {id(p) for name, p in named if sampling_parts & {*name.split(".")}}
    parts = [
        ([p for p in trained if id(p) not in inside | sampling], 1.0),
        *_backbone_parts(backbone, config),
        ([p for p in trained if id(p) in sampling], config.sampling_rate_factor),
    ]
    rates = [(parameters, factor * config.learning_rate) for parameters, factor in parts]
    groups: list[dict[str, object]] = [
        {"params": found, "lr": rate, "base_rate": rate} for found, rate in rates if found
    ]
    return groups if not config.inherited_warmup_steps else _halved(groups, inherited)


def _backbone_parts(
    backbone: nn.Module, config: OptimisationConfig
) -> list[tuple[list[nn.Parameter], float]]:
    """What is trained of the backbone, and its factors: a smaller one the earlier the layer.

    (Bao et al., arXiv 2106.08254, and the code of LW-DETR: the last block has the decay itself,
    the embeddings its power of blocks + 1.)
    """
    factor, decay = config.backbone_rate_factor, config.layer_decay
    layers = [list(backbone.parameters())] if decay is None else layers_of(backbone)[::-1]
    return [
        ([p for p in layer if p.requires_grad], factor * (decay or 1.0) ** steps)
        for steps, layer in enumerate(layers)
    ]


def _halved(groups: list[dict[str, Any]], inherited: frozenset[int]) -> list[dict[str, object]]:
    """Each group's new parameters, then its inherited ones."""
    parts = [
        {**group, "params": [p for p in group["params"] if (id(p) in inherited) == old]}
        | {"inherited": old}
        for group in groups
        for old in (False, True)
    ]
    return [part for part in parts if part["params"]]


def build_optimiser(
    module: nn.Module,
    backbone: nn.Module,
    config: OptimisationConfig,
    sampling_parts: frozenset[str] = frozenset(),
    inherited: frozenset[int] = frozenset(),
) -> AdamW:
    """AdamW over ``parameter_groups``, in its fused form where device and type have one."""
    groups = parameter_groups(module, backbone, config, sampling_parts, inherited)
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


def learning_rate_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Factor on the base learning rates.

    Args:
        step: optimiser step, from 0.
        steps: optimiser steps of the whole run.
        config: kind of schedule and its numbers.

    Returns:
        A number in (0, 1]. In the warm-up, step 0 already takes a (small) step:
        (step + 1) / warmup_steps.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.kind == "cosine":
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return config.final_factor + (1 - config.final_factor) * cosine
    if config.kind == "step":
        return 0.1 if step >= config.drop_at * steps else 1.0
    return 1.0


def distillation_scale(step: int, warmup_steps: int) -> float:
    """Factor on the distillation terms at optimiser ``step``: 0 at first, 1 after the warm-up."""
    return 1.0 if warmup_steps == 0 else min(1.0, step / warmup_steps)


def inherited_factor(step: int, config: OptimisationConfig) -> float:
    """Factor on the learning rates of what was inherited, at optimiser ``step``."""
    return config.inherited_rate_factor if step < config.inherited_warmup_steps else 1.0


def set_learning_rates(optimiser: AdamW, factor: float, inherited: float = 1.0) -> None:
    """Multiply every group's base rate by ``factor``, those of inherited parts by both."""
    for group in optimiser.param_groups:
        own = inherited if group.get("inherited") else 1.0
        group["lr"] = group["base_rate"] * factor * own


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
