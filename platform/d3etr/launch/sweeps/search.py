"""The search of a sweep in Ray Tune's terms: parameters, searcher, scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, Searcher

from d3etr.config.sweep import Domain, SweepConfig
from d3etr.launch.sweeps.history import Curve
from d3etr.launch.sweeps.plan import TRIAL_KEY, Plan

METRIC, MODE, TIME = "mAP", "max", "epoch"
"""Epochs as trials report them: unlike Tune's own iterations, they survive a restart."""
LONGEST = 10**9
"""No epoch is the last for a scheduler: trials end themselves."""


def parameters(plan: Plan) -> dict[str, Any]:
    """What Tune gives to trials: numbers of planned ones, or values of the space."""
    if not plan.searched:
        return {TRIAL_KEY: tune.grid_search([trial.number for trial in plan.trials])}
    if plan.sweep.search.method == "optuna":
        return {}  # the searcher has the space
    return {key: _tune_domain(domain) for key, domain in plan.sweep.space.items()}


class _RoomNow:
    """Goes on from a saved state with as many trials at a time as there is room for now."""

    max_concurrent: int

    def set_state(self, state: dict[str, Any]) -> None:
        """Take all but the number of trials at a time."""
        super().set_state(state | {"max_concurrent": self.max_concurrent})  # type: ignore[misc]


class Planned(_RoomNow, BasicVariantGenerator):  # type: ignore[misc]
    """Gives out planned trials."""


class Limited(_RoomNow, ConcurrencyLimiter):  # type: ignore[misc]
    """Proposes trials, so many at a time."""


class Pruning(ASHAScheduler):  # type: ignore[misc]
    """Stops trials early."""

    def recall(self, curves: Mapping[str, Curve]) -> None:
        """Compare also with what trials reported before, by Ray Tune's id of each."""
        (bracket,) = self._brackets
        for identity, curve in curves.items():
            for epoch, mAP in curve:
                bracket.on_result(SimpleNamespace(trial_id=identity), epoch, mAP)


def searcher(sweep: SweepConfig, at_a_time: int) -> Searcher | Planned | None:
    """What gives out trials; None for a population, which takes turns.

    Who has paused in a population must not keep others from beginning. Optuna's space is a
    function, so that a condition can look at what was chosen before.
    """
    search = sweep.search
    if search.method == "population":
        return None
    if search.method != "optuna":
        return Planned(max_concurrent=at_a_time)
    from optuna.samplers import TPESampler
    from ray.tune.search.optuna import OptunaSearch

    sampler = TPESampler(seed=search.seed, n_startup_trials=search.startup_trials)
    found = OptunaSearch(space=Proposer(sweep), metric=METRIC, mode=MODE, sampler=sampler)
    return Limited(found, max_concurrent=at_a_time)


@dataclass(frozen=True)
class Proposer:
    """Optuna's space as a function; Tune saves it with the searcher.

    Attributes:
        sweep: whose space it is.
    """

    sweep: SweepConfig

    def __call__(self, proposal: Any) -> None:
        """Ask ``proposal``, an Optuna trial, for every key whose condition holds."""
        chosen: dict[str, Any] = {}
        for key, domain in self.sweep.space.items():
            if domain.applies(chosen):
                chosen[key] = _suggest(proposal, key, domain)


def scheduler(sweep: SweepConfig) -> TrialScheduler | None:
    """What stops trials, or makes them copy others."""
    if sweep.search.method == "population":
        return PopulationBasedTraining(
            time_attr=TIME,
            perturbation_interval=sweep.search.perturb_every_epochs,
            hyperparam_mutations={k: _mutation(domain) for k, domain in sweep.space.items()},
            # All wait for each other: repeatable, and nobody copies a checkpoint that is gone.
            synch=True,
            custom_explore_fn=lambda point: within(point, sweep.space),
        )
    if sweep.pruning is None:
        return None
    return Pruning(
        time_attr=TIME,
        max_t=LONGEST,
        grace_period=sweep.pruning.grace_epochs,
        reduction_factor=sweep.pruning.reduction,
        stop_last_trials=False,
    )


def within(point: Mapping[str, Any], space: Mapping[str, Domain]) -> dict[str, Any]:
    """The point with every number inside its range: a perturbation may step over the edge."""
    kept = dict(point)
    for key, domain in space.items():
        limits = domain.uniform or domain.loguniform
        if limits is not None:
            kept[key] = min(max(point[key], limits[0]), limits[1])
    return kept


def _suggest(proposal: Any, key: str, domain: Domain) -> Any:
    if domain.choice is not None:
        return proposal.suggest_categorical(key, domain.choice)
    low, high = domain.uniform or domain.loguniform or (0.0, 1.0)
    return proposal.suggest_float(key, low, high, log=domain.loguniform is not None)


def _tune_domain(domain: Domain) -> Any:
    if domain.choice is not None:
        return tune.choice(list(domain.choice))
    low, high = domain.uniform or domain.loguniform or (0.0, 1.0)
    if domain.loguniform is None:
        return tune.uniform(low, high)
    return tune.loguniform(low, high)


def _mutation(domain: Domain) -> Any:
    """Choices shift to a neighbour; numbers are scaled, or drawn anew."""
    return list(domain.choice) if domain.choice is not None else _tune_domain(domain)
