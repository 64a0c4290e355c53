"""The search of a sweep in Ray Tune's terms: what gives out trials, and what stops them early.

What a search has proposed is kept in Optuna's journal in the sweep's folder, and what trials
reported in the journals of their runs. So every start of a sweep begins with a fresh Ray Tune,
which is given what is left to train.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from d3etr.config.sweep import Domain
from d3etr.engine.find_run import folder_of
from d3etr.errors import UserError
from d3etr.launch.sweeps.plan import Plan
from d3etr.launch.sweeps.results import TrialResult, curve_of
from d3etr.launch.sweeps.trials import NUMBER, POINT, Trial

METRIC, MODE, TIME = "mAP", "max", "epoch"
"""Epochs as trials report them: unlike Tune's own iterations, they survive a restart."""
LONGEST = 10**9
"""No epoch is the last for a scheduler: trials end themselves."""
SEARCH_FILE = "search.log"
"""Optuna's journal of the points that were proposed and what they gave."""


def open_study(plan: Plan) -> optuna.Study | None:
    """Optuna's study of a sweep that is searched; None for a planned one.

    Raises:
        UserError: its file is damaged, or missing where an earlier version began the search.
    """
    if not plan.searched:
        return None
    file = plan.folder / SEARCH_FILE
    if not file.exists() and (plan.folder / "tune").exists():
        raise UserError(
            f"the search in {plan.folder} was begun by an earlier version of d3etr. Remove its "
            "folder tune to begin the search anew; the runs beside it stay"
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = JournalStorage(JournalFileBackend(str(file)))
        return optuna.create_study(
            storage=storage, study_name="sweep", direction="maximize", load_if_exists=True
        )
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{file} is damaged ({error}). Remove it to begin the search anew; the runs beside it "
            "stay"
        ) from error


def known_trials(plan: Plan, study: optuna.Study | None) -> list[Trial]:
    """The planned trials, or those that were proposed until now."""
    if study is None:
        return list(plan.trials)
    proposed = [trial for trial in study.trials if POINT in trial.user_attrs]
    return [plan.trial({NUMBER: one.number, POINT: one.user_attrs[POINT]}) for one in proposed]


class TrialSource(Searcher):  # type: ignore[misc]
    """Gives Ray Tune the trials that are left: known ones first, then what Optuna proposes.

    Args:
        plan: the sweep.
        study: of a search.
        ended: trials that need no training any more.
    """

    def __init__(
        self, plan: Plan, study: optuna.Study | None, ended: Collection[TrialResult]
    ) -> None:
        super().__init__(metric=METRIC, mode=MODE)
        self._plan, self._study = plan, study
        numbers = {result.trial.number for result in ended}
        known = known_trials(plan, study)
        self._waiting = [trial for trial in known if trial.number not in numbers]
        self._given: dict[str, int] = {}
        proposals = 0 if study is None else plan.sweep.search.trials - len(known)
        self.remaining = len(self._waiting) + max(0, proposals)
        """So many trials are left to train."""
        for result in ended:
            self._tell(result.trial.number, result.mAP)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The parameters of the next trial; Tune asks ``remaining`` times."""
        trial = self._waiting.pop(0) if self._waiting else self._proposed()
        self._given[trial_id] = trial.number
        return {NUMBER: trial.number, POINT: trial.point}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna what a trial gave; one that failed is tried again by the next start."""
        if result and not error and "reason" not in result:
            self._tell(self._given[trial_id], result[METRIC])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: Optuna's journal has everything."""

    def _tell(self, number: int, mAP: float | None) -> None:
        if self._study is not None and mAP is not None:
            self._study.tell(number, mAP, skip_if_finished=True)

    def _proposed(self) -> Trial:
        """Ask Optuna for every key whose condition holds, given what was chosen before."""
        assert self._study is not None
        search = self._plan.sweep.search
        # A sampler of its own for each proposal: a search that was interrupted repeats none.
        seed = (search.seed + len(self._study.trials)) % 2**32
        self._study.sampler = TPESampler(seed=seed, n_startup_trials=search.startup_trials)
        proposal, point = self._study.ask(), dict[str, Any]()
        for key, domain in self._plan.sweep.space.items():
            if domain.applies(point):
                point[key] = _suggest(proposal, key, domain)
        proposal.set_user_attr(POINT, point)
        return self._plan.trial({NUMBER: proposal.number, POINT: point})


def _suggest(proposal: optuna.Trial, key: str, domain: Domain) -> Any:
    if domain.choice is not None:
        return domain.choice[proposal.suggest_categorical(key, range(len(domain.choice)))]
    low, high = domain.uniform or domain.loguniform or (0.0, 1.0)
    return proposal.suggest_float(key, low, high, log=domain.loguniform is not None)


class Pruning(ASHAScheduler):  # type: ignore[misc]
    """Stops trials early; compares also with what was reported before the sweep was interrupted.

    Args:
        plan: the sweep, which prunes.
        ended: trials that are not trained any more.
    """

    def __init__(self, plan: Plan, ended: Iterable[TrialResult]) -> None:
        assert plan.sweep.pruning is not None
        super().__init__(
            time_attr=TIME,
            max_t=LONGEST,
            grace_period=plan.sweep.pruning.grace_epochs,
            reduction_factor=plan.sweep.pruning.reduction,
            stop_last_trials=False,
        )
        self._plan = plan
        for result in ended:
            if result.run_dir is not None:
                self._recall(f"ended-{result.trial.number}", result.run_dir)

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Take a trial with what it has reported before."""
        super().on_trial_add(tune_controller, trial)
        config = self._plan.config(self._plan.trial(trial.config))
        self._recall(trial.trial_id, folder_of(config).path)

    def _recall(self, identity: str, run_dir: Path) -> None:
        (bracket,) = self._brackets
        for epoch, mAP in curve_of(run_dir):
            bracket.on_result(SimpleNamespace(trial_id=identity), epoch, mAP)
