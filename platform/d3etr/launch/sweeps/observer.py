"""Takes Tune's events in the driver: reports to a person, has MLflow follow every run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial as TuneTrial

from d3etr.engine.run_folder import RunFolder
from d3etr.launch.driver import Status
from d3etr.launch.sweeps.plan import Plan
from d3etr.launch.sweeps.resource_timeout import ResourceTimeout
from d3etr.launch.sweeps.trainable import failure_reason
from d3etr.launch.sweeps.trial_ids import number_of
from d3etr.launch.sweeps.trial_tracking import TrackedChildren
from d3etr.launch.sweeps.trials import Trial
from d3etr.progress import OnProgress


class Observer(Callback):  # type: ignore[misc]
    """Takes Tune's events.

    Args:
        plan: the sweep.
        on_progress: takes lines for a person.
        children: tracks runs; None tracks nothing.
        timeout: ends a sweep that waits in vain for room that others use; None where there are
            no others.
    """

    def __init__(
        self,
        plan: Plan,
        on_progress: OnProgress,
        children: TrackedChildren | None,
        timeout: ResourceTimeout | None,
    ) -> None:
        self._plan, self._on_progress, self._children = plan, on_progress, children
        self._timeout = timeout
        self._folders: dict[int, Path] = {}
        self._began = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Tune looks around, several times a second."""
        if self._timeout is not None:
            self._timeout.check(trial.status for trial in trials)

    def on_trial_result(
        self,
        iteration: int,
        trials: list[TuneTrial],
        trial: TuneTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """An evaluation of a trial."""
        number, run_dir = trial_of(self._plan, trial).number, Path(result["run_dir"])
        before = self._folders.get(number)
        if before != run_dir:
            if before is not None:
                self._on_progress(f"{self._title(trial)} goes on from another trial's weights")
                self._end(before, "KILLED")
            self._folders[number] = run_dir
            self._follow(run_dir, trial)
        self._on_progress(
            f"{self._title(trial)} | epoch {result['epoch']} | mAP {100 * result['mAP']:.1f}"
        )

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """A trial has come to its end, or was stopped early."""
        run_dir = self._folders.get(trial_of(self._plan, trial).number)
        finished = run_dir is not None and RunFolder(run_dir).summary.exists()
        end = "finished" if finished else "stopped early"
        self._on_progress(f"{self._count(trial, trials)} {end}")
        if run_dir is not None:
            self._end(run_dir, "FINISHED" if finished else "KILLED")

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """A trial has failed for good."""
        reason = failure_reason(self._plan, trial_of(self._plan, trial).number)
        first = (reason or "its process was lost").splitlines()[0]
        self._on_progress(f"{self._count(trial, trials)} failed: {first}")
        run_dir = self._folders.get(trial_of(self._plan, trial).number)
        if run_dir is not None:
            self._end(run_dir, "FAILED")

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its callbacks; a resumed sweep has a driver and an observer of its own."""
        return {"_plan": self._plan}

    def _follow(self, run_dir: Path, trial: TuneTrial) -> None:
        if self._children is not None:
            self._children.follow(run_dir, self._title(trial))

    def _end(self, run_dir: Path, status: Status) -> None:
        if self._children is not None:
            self._children.end(run_dir, status)

    def _count(self, trial: TuneTrial, trials: list[TuneTrial]) -> str:
        ended = {number_of(other) for other in trials if other.is_finished()} | {number_of(trial)}
        known = len(self._plan.trials) or self._plan.sweep.search.trials
        return f"[{len(ended)}/{known}] {self._title(trial)}"

    def _title(self, trial: TuneTrial) -> str:
        return trial_of(self._plan, trial).title(self._plan.sweep)


def trial_of(plan: Plan, trial: TuneTrial) -> Trial:
    """Ours for Tune's."""
    return plan.trial(trial.config, number_of(trial))
