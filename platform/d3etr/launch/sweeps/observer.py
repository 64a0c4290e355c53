"""Takes Tune's events in the driver: reports to a person, keeps how trials end, tracks runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial as TuneTrial

from d3etr.config.infrastructure import ClusterConfig
from d3etr.engine.journal import read_journal
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.launch.driver import Status
from d3etr.launch.ray_cluster import cluster_nodes, free_resources
from d3etr.launch.resources import Demand, describe
from d3etr.launch.sweeps.plan import Plan
from d3etr.launch.sweeps.results import TrialResult, best, finished, keep_as_pruned
from d3etr.launch.sweeps.trial_tracking import SweepTracking
from d3etr.progress import OnProgress, duration


class ResourceTimeout:
    """Ends a sweep whose trials wait and none trains; Tune itself would wait for ever.

    Args:
        cluster: how long to wait for room.
        demand: of one trial.
        on_progress: takes lines for a person.
    """

    def __init__(self, cluster: ClusterConfig, demand: Demand, on_progress: OnProgress) -> None:
        self._notice = cluster.start_timeout_seconds
        self._limit = self._notice * (cluster.maximum_failures + 1)
        self._demand, self._on_progress = demand, on_progress
        self._since, self._noticed = time.monotonic(), False

    def check(self, statuses: Iterable[str]) -> None:
        """Take the trials' states; called again and again.

        Raises:
            UserError: trials have waited for as long as a run would, and none trains.
        """
        states = set(statuses)
        if "RUNNING" in states or "PENDING" not in states:
            self._since, self._noticed = time.monotonic(), False
            return
        waited = time.monotonic() - self._since
        if waited <= self._notice or (self._noticed and waited <= self._limit):
            return
        free = free_resources()
        lack = (
            f"no room for a trial ({self._demand}): the cluster has {describe(cluster_nodes())}, "
            f"of which {free.cpus:g} CPUs and {free.gpus:g} GPUs are free"
        )
        if waited > self._limit:
            raise UserError(
                f"{lack}, since {self._limit:g} seconds (cluster.start_timeout_seconds times "
                "maximum_failures + 1). Wait for other jobs to end; the same command goes on with "
                "the sweep."
            )
        self._noticed = True
        self._on_progress(f"{lack}; waiting for other jobs")


class Observer(Callback):  # type: ignore[misc]
    """Takes Tune's events.

    Args:
        plan: the sweep.
        ended: results of trials that need no training; those of others join them.
        on_progress: takes lines for a person.
        tracking: of runs; None tracks nothing.
        timeout: None where nobody else uses the cluster.
        at_a_time: trials that train beside each other.
    """

    def __init__(
        self,
        plan: Plan,
        ended: dict[int, TrialResult],
        on_progress: OnProgress,
        tracking: SweepTracking | None,
        timeout: ResourceTimeout | None,
        at_a_time: int = 1,
    ) -> None:
        self._plan, self._ended, self._on_progress = plan, ended, on_progress
        self._tracking, self._timeout, self._at_a_time = tracking, timeout, at_a_time
        self._begun, self._before = time.monotonic(), len(ended)
        self._trials_begun = dict[str, float]()
        self._foretold = False

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its callbacks; nobody reads that."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Tune looks around, several times a second."""
        if self._timeout is not None:
            self._timeout.check(trial.status for trial in trials)

    def on_trial_start(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """A trial begins."""
        self._trials_begun.setdefault(trial.trial_id, time.monotonic())

    def on_trial_result(
        self,
        iteration: int,
        trials: list[TuneTrial],
        trial: TuneTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """An evaluation of a trial, or why it failed."""
        if "reason" in result:
            return
        planned = self._plan.trial(trial.config)
        if self._tracking is not None:
            self._tracking.follow(Path(result["run_dir"]), planned)
        parts = [
            planned.label(self._plan.sweep),
            f"epoch {result['epoch']}",
            f"mAP {100 * result['mAP']:.1f}",
        ]
        self._on_progress(" | ".join(parts + _rate(Path(result["run_dir"]))))
        self._foretell(trial, result)

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """A trial has come to its end, was stopped early, or has reported why it failed."""
        self._end(trial, (trial.last_result or {}).get("reason"))

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """A trial's process was lost more often than it may be."""
        self._end(trial, "its process was lost")

    def _end(self, tune_trial: TuneTrial, reason: str | None) -> None:
        trial, report = self._plan.trial(tune_trial.config), tune_trial.last_result or {}
        run_dir = Path(report["run_dir"]) if "run_dir" in report else None
        status: Status = "FINISHED"
        metrics = None if run_dir is None or "reason" in report else RunFolder(run_dir).result()
        if run_dir is not None and metrics is not None:
            result = finished(trial, run_dir)
            text = f"finished, mAP {_percent(result.mAP)}"
        elif reason is not None or run_dir is None:
            result = TrialResult(trial, "failed", run_dir, reason=reason)
            status, text = "FAILED", f"failed: {(reason or '').partition(chr(10))[0]}"
        else:
            result = keep_as_pruned(self._plan, trial, run_dir)
            text = f"stopped early at epoch {result.epoch}, mAP {_percent(result.mAP)}"
        self._ended[trial.number] = result
        self._on_progress(self._line_of(result, text))
        if self._tracking is not None and run_dir is not None:
            self._tracking.end(run_dir, status, stopped_early=result.state == "pruned")

    def _line_of(self, result: TrialResult, text: str) -> str:
        """A trial that ended, with the best until now and the time that is left."""
        sweep = self._plan.sweep
        known = len(self._plan.trials) or sweep.search.trials
        line = f"[{len(self._ended)}/{known}] {result.trial.label(sweep)} {text}"
        leader = best(list(self._ended.values()))
        if leader is result:
            line += " | the best so far"
        elif leader is not None:
            line += f" | best so far {_percent(leader.mAP)}: {leader.trial.label(sweep)}"
        return line + self._time_left(known)

    def _foretell(self, trial: TuneTrial, result: Mapping[str, Any]) -> None:
        """Say once, from the first evaluation of a trial, how long all of them take."""
        begun = self._trials_begun.get(trial.trial_id)
        known = len(self._plan.trials) or self._plan.sweep.search.trials
        share = 0.0 if self._foretold else _share_done(Path(result["run_dir"]), result["epoch"])
        left = known - self._before
        if begun is None or not 0 < share < 1 or left < 1:
            return
        self._foretold = True
        each = (time.monotonic() - begun) / share
        rounds = -(-left // self._at_a_time)
        self._on_progress(
            f"about {duration(rounds * each)} for {left} trials, {self._at_a_time} at a time, each "
            f"{duration(each)} if all are like this one"
        )

    def _time_left(self, known: int) -> str:
        """From how long trials took until now, as if those to come were like them."""
        done, waiting = len(self._ended) - self._before, known - len(self._ended)
        if done < 1 or waiting < 1:
            return ""
        return f" | about {duration((time.monotonic() - self._begun) / done * waiting)} left"


def _percent(mAP: float | None) -> str:
    return "unknown" if mAP is None else f"{100 * mAP:.1f}"


def _rate(run_dir: Path) -> list[str]:
    """The newest speed of training that a run's journal has."""
    rates = [
        record["metrics"]["time/images_per_second"]
        for record in read_journal(RunFolder(run_dir).journal)
        if "time/images_per_second" in record.get("metrics", {})
    ]
    return [f"{rates[-1]:.3g} images/s"] if rates else []


def _share_done(run_dir: Path, epoch: float) -> float:
    """What part of a run is over after an epoch, by its journal; 0 where that is not known."""
    starts = [r for r in read_journal(RunFolder(run_dir).journal) if r["kind"] == "start"]
    if not starts or not starts[-1]["steps"]:
        return 0.0
    return float(epoch * (starts[-1].get("steps_per_epoch") or 0) / starts[-1]["steps"])
