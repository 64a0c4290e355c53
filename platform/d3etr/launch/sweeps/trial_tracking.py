"""Tracks a sweep: MLflow follows the journal of every trial's run, from the driver."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from d3etr.config.load import load_config
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.launch.driver import Status
from d3etr.launch.sweeps.plan import Plan
from d3etr.launch.sweeps.results import TrialResult, best
from d3etr.launch.sweeps.trials import Trial
from d3etr.logs import get_logger
from d3etr.tracking.state import read_state

if TYPE_CHECKING:
    from d3etr.tracking.runs import Tracker

logger = get_logger(__name__)


class SweepTracking:
    """A sweep's run in MLflow and those of its trials below it.

    Runs of trials are followed, and ended in the background: a sweep never waits for MLflow.

    Args:
        plan: the sweep, whose folder is there.

    Raises:
        UserError: MLflow does not answer or refuses.
    """

    def __init__(self, plan: Plan) -> None:
        from d3etr.tracking.sweeps import SweepRun

        self._plan = plan
        title = plan.sweep.title or plan.sweep.name
        self._run = SweepRun(plan.base, plan.folder, title, _params(plan))
        self._followed: dict[Path, Tracker] = {}
        self._asked: set[Path] = set()
        self._pool = ThreadPoolExecutor(1, "tracking")

    def follow(self, run_dir: Path, trial: Trial) -> None:
        """Follow a trial's journal from its beginning on; a failure is a warning.

        It goes where the sweep goes, also where an interrupted one was tracked elsewhere before.
        """
        from d3etr.tracking.runs import open_tracker

        if run_dir in self._followed:
            return
        self._asked.add(run_dir)
        folder, parent = RunFolder(run_dir), self._run.run_id
        try:
            state = read_state(run_dir)
            if state is None or not state.complete or folder.result() is None:
                tracking = self._plan.config(trial).tracking
                config = load_config(folder.config).model_copy(update={"tracking": tracking})
                name = trial.label(self._plan.sweep)
                tracker = open_tracker(config, run_dir, parent_run=parent, name=name)
                self._followed[run_dir] = tracker
        except Exception as error:
            logger.warning("%s is not tracked: %s", run_dir.name, error)

    def end(self, run_dir: Path, status: Status, *, stopped_early: bool = False) -> None:
        """Send the rest in the background."""
        tracker = self._followed.pop(run_dir, None)
        if tracker is not None:
            self._pool.submit(_end, tracker, status, stopped_early)

    def close(self) -> None:
        """End what is left and wait until everything was sent."""
        for run_dir in list(self._followed):
            self.end(run_dir, "KILLED")
        self._pool.shutdown()

    def stopped(self, status: Status) -> None:
        """Send what there is; the same command goes on with the sweep's run."""
        self.close()
        self._run.stopped(status)

    def how_to_open(self) -> list[str]:
        """What a person types and opens to see the trials in MLflow."""
        return self._run.how_to_open()

    def finish(self, results: list[TrialResult], files: list[Path]) -> None:
        """Send what the sweep found, and what MLflow lacks of trials; register the best student."""
        from d3etr.launch.sweeps.importance import importances
        from d3etr.tracking.sweeps import Swept

        for result in results:
            self._replay(result)
        self.close()
        swept = {
            result.trial.number: Swept(
                result.trial.label(self._plan.sweep), result.mAP, result.run_dir
            )
            for result in results
            if result.state == "finished" and result.mAP is not None and result.run_dir is not None
        }
        found = importances(self._plan.sweep, results)
        missing = self._run.finish("FINISHED", list(swept.values()), files, found)
        if missing is not None:
            logger.warning("%s", missing)
        winner = best(results)
        try:
            if winner is not None:
                self._run.register_best(swept[winner.trial.number])
        except Exception as error:
            logger.warning("the best student could not be registered: %s", error)

    def _replay(self, result: TrialResult) -> None:
        """Send what MLflow lacks of a run that ended under a driver before, which may have died."""
        if result.run_dir is None or result.state == "unfinished" or result.run_dir in self._asked:
            return
        finished = result.state == "finished"
        if finished or _was_broken_off(result.run_dir):
            self.follow(result.run_dir, result.trial)
            status: Status = "FAILED" if result.state == "failed" else "FINISHED"
            self.end(result.run_dir, status, stopped_early=result.state == "pruned")


def _end(tracker: Tracker, status: Status, stopped_early: bool) -> None:
    try:
        if stopped_early:
            tracker.mark_as_stopped_early()
        missing = tracker.finish(status)
    except Exception as error:
        missing = f"tracking failed at the end of a run: {error!r}"
    if missing is not None:
        logger.warning("%s", missing)


def _was_broken_off(run_dir: Path) -> bool:
    """Whether the run in MLflow was begun and not ended."""
    try:
        state = read_state(run_dir)
    except UserError:  # damaged: following it warns
        return True
    return state is not None and not state.complete


def _params(plan: Plan) -> dict[str, str]:
    sweep = plan.sweep
    params = {"recipe": str(sweep.recipe), "search.method": sweep.search.method}
    params |= {"seeds": ", ".join(map(str, sweep.seeds))}
    for key, domain in sweep.space.items():
        params[f"space.{key}"] = str(domain.model_dump(mode="json", exclude_unset=True))
    if sweep.cases:
        params["cases"] = ", ".join(sweep.cases)
    return params
