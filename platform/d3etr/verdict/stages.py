"""The sweeps of a verdict: every contender as many steps as fit into the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from d3etr.config.shipped import find_recipe
from d3etr.config.sweep import Case, SweepConfig
from d3etr.errors import UserError
from d3etr.verdict.contenders import Way

EVALUATIONS = 8
"""On validation along a run: points of its curve."""
FEWEST_STEPS = 8
WARM_UP_SHARE = 4
"""A warm-up takes at most one in so many steps, where a run is shorter than its recipe's."""
NEVER = 10**9
MAXIMUM_NAME = 60


@dataclass(frozen=True)
class Entry:
    """A contender at one learning rate.

    Attributes:
        way: what it trains.
        rate: factor on the recipe's learning rate.
        steps: optimiser steps.
        prepared: seconds that its teacher takes before the first one.
    """

    way: Way
    rate: float
    steps: int
    prepared: float = 0.0

    @property
    def title(self) -> str:
        """``distilled, rate x 0.33``."""
        return f"{self.way.name}, rate x {self.rate:g}"

    def overrides(self) -> tuple[str, ...]:
        """On top of the recipe."""
        config = self.way.config
        rate = config.optimisation.learning_rate * self.rate
        most = max(1, self.steps // WARM_UP_SHARE)
        warm_ups = {
            "optimisation.schedule.warmup_steps": config.optimisation.schedule.warmup_steps,
            "optimisation.inherited_warmup_steps": config.optimisation.inherited_warmup_steps,
        }
        if config.distillation.warmup:
            warm_ups["distillation.warmup_steps"] = config.distillation.warmup
            most = max(1, config.distillation.distilled_steps(self.steps) // WARM_UP_SHARE)
        return (
            *self.way.overrides,
            "optimisation.epochs=null",
            f"optimisation.steps={self.steps}",
            f"optimisation.learning_rate={rate!r}",
            *(f"{key}={most}" for key, warm_up in warm_ups.items() if warm_up > most),
            f"evaluation.every_epochs={NEVER}",
            f"evaluation.every_steps={max(1, self.steps // EVALUATIONS)}",
            "evaluation.test=false",
        )


def entry(way: Way, rate: float, seconds: float, cost: float, prepared: float = 0.0) -> Entry:
    """A contender with as many steps as fit into a time.

    Args:
        way: the contender.
        rate: factor on its learning rate.
        seconds: of the whole run.
        cost: seconds of one step.
        prepared: seconds of the whole that pass before the first step.

    Raises:
        UserError: hardly any fit.
    """
    steps = round((seconds - prepared) / cost)
    if steps < FEWEST_STEPS:
        less = f" less {prepared:.3g} for what its teacher does first" if prepared else ""
        raise UserError(
            f"{seconds:.3g} seconds{less} are {max(0, steps)} steps of '{way.name}', each of "
            f"{1000 * cost:.3g} ms; expected at least {FEWEST_STEPS}: give more --minutes"
        )
    return Entry(way, rate, steps, prepared)


def sweep_of(
    stage: str,
    recipe: Path,
    overrides: Sequence[str],
    entries: Mapping[str, Entry],
    seeds: Sequence[int],
) -> SweepConfig:
    """A sweep that trains entries, each with every seed.

    Args:
        stage: end of its name.
        recipe: that all are made from; a file, or the name of a shipped one.
        overrides: of all.
        entries: by the name of their case.
        seeds: of the runs.
    """
    first = next(iter(entries.values())).way.config
    name = f"{first.run.name[: MAXIMUM_NAME - len(stage) - 9]}-verdict-{stage}"
    return SweepConfig(
        name=name,
        title=f"{first.run.name}: {stage} runs of a verdict",
        recipe=find_recipe(recipe),
        set=(*overrides, "tracking.figures=false"),
        seeds=tuple(seeds),
        cases={title: Case(set=each.overrides()) for title, each in entries.items()},
    )
