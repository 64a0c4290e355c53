"""How much each key of a sweep's space matters for validation mAP.

The variance of mAP that a key alone explains in a random forest over the trials (fANOVA, Hutter
et al. 2014), as a share of what all keys explain each by themselves. Optuna computes it, for any
method of searching.
"""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from d3etr.config.sweep import Domain, SweepConfig
from d3etr.launch.sweeps.results import TrialResult
from d3etr.launch.sweeps.trials import short_names

FEWEST_TRIALS = 8
"""Our choice: of fewer, a forest finds what chance did."""


def importances(sweep: SweepConfig, results: Sequence[TrialResult]) -> dict[str, float]:
    """Each key's share, the largest first, from trials that finished or were stopped early.

    The latter count with the last mAP that they had, as they do for the search: without them only
    good trials would be left, in which a key that ruins all others looks harmless.

    Args:
        sweep: whose space it is.
        results: its trials.

    Returns:
        Short name of a key -> share in [0, 1]; together 1. Empty where nothing can be found: fewer
        than ``FEWEST_TRIALS`` trials, fewer than two keys that every trial has, named cases, or one
        mAP for all.
    """
    measured = [r for r in results if r.state in ("finished", "pruned") and r.mAP is not None]
    shared = [key for key in sweep.space if all(key in r.trial.point for r in measured)]
    if sweep.cases or len(measured) < FEWEST_TRIALS or len(shared) < 2:
        return {}
    spaces = {key: _distribution(sweep.space[key]) for key in shared}
    study = optuna.create_study(direction="maximize")
    for result in measured:
        values = {key: _encoded(sweep.space[key], result.trial.point[key]) for key in shared}
        study.add_trial(create_trial(params=values, distributions=spaces, value=result.mAP))
    try:
        found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    except RuntimeError:  # no variance at all
        return {}
    names = short_names(list(sweep.space))
    return {names[key]: round(float(share), 4) for key, share in found.items()}


def importance_line(sweep: SweepConfig, results: Sequence[TrialResult]) -> str:
    """The importances in a line; "" where there are none."""
    found = importances(sweep, results)
    if not found:
        return ""
    stopped = sum(r.state == "pruned" and r.mAP is not None for r in results)
    count = sum(r.state == "finished" and r.mAP is not None for r in results) + stopped
    shares = ", ".join(f"{name} {share:.2f}" for name, share in found.items())
    return f"importance for validation mAP: {shares} ({count} trials, {stopped} stopped early)"


def _distribution(domain: Domain) -> BaseDistribution:
    options = domain.grid or domain.choice
    if options:
        return CategoricalDistribution(range(len(options)))
    low, high = domain.uniform or domain.loguniform or (0.0, 1.0)
    return FloatDistribution(low, high, log=domain.loguniform is not None)


def _encoded(domain: Domain, value: object) -> object:
    """A value as its distribution has it: of a list, the place in it."""
    options = domain.grid or domain.choice
    return list(options).index(value) if options else value
