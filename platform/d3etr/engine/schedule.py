"""Learning rate over optimiser steps: a pure function of the step, so nothing needs saving."""

from __future__ import annotations

import math

from d3etr.config.training import ScheduleConfig


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
