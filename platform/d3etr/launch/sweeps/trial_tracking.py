"""Tracks a sweep: MLflow follows the journal of every trial's run, from the driver."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from d3etr.config.load import load_config
from d3etr.config.tree import Config
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.launch.driver import Status, Tracker
from d3etr.launch.sweeps.plan import Plan
from d3etr.launch.sweeps.results import TrialResult, best
from d3etr.logs import get_logger
from d3etr.tracking.state import read_state

if TYPE_CHECKING:
    from d3etr.tracking.sweeps import Swept

logger = get_logger(__name__)

OpenChild = Callable[[Config, Path, str], Tracker]
"""Starts tracking of a run, under a name."""


class TrackedChildren:
    """Runs that are followed, and ended in the background: a sweep never waits for MLflow.

    Args:
        open_child: starts tracking a run; what it raises is a warning.
    """

    def __init__(self, open_child: OpenChild) -> None:
        self._open = open_child
        self._followed: dict[Path, Tracker] = {}
        self._asked: set[Path] = set()
        self._pool = ThreadPoolExecutor(1, "tracking")

    def follow(self, run_dir: Path, title: str) -> None:
        """Follow a run's journal from its beginning on."""
        if run_dir in self._followed:
            return
        self._asked.add(run_dir)
        folder = RunFolder(run_dir)
        try:
            state = read_state(run_dir)
            if state is not None and state.complete and folder.result() is not None:
                return
            self._followed[run_dir] = self._open(load_config(folder.config), run_dir, title)
        except Exception as error:
            logger.warning("%s is not tracked: %s", run_dir.name, error)

    def end(self, run_dir: Path, status: Status) -> None:
        """Send the rest in the background."""
        tracker = self._followed.pop(run_dir, None)
        if tracker is not None:
            self._pool.submit(_end, tracker, status)

    def replay(self, run_dir: Path, title: str, status: Status) -> None:
        """Send, in the background, what MLflow lacks of a run that ended under a driver before.

        That driver may have died while it was sending.
        """
        if run_dir not in self._asked:
            self.follow(run_dir, title)
            self.end(run_dir, status)

    def close(self, status: Status) -> None:
        """End what is left and wait until everything was sent."""
        for run_dir in list(self._followed):
            self.end(run_dir, status)
        self._pool.shutdown()


def _end(tracker: Tracker, status: Status) -> None:
    try:
        missing = tracker.finish(status)
    except Exception as error:
        missing = f"tracking failed at the end of a run: {error!r}"
    if missing is not None:
        logger.warning("%s", missing)


class SweepTracking:
    """A sweep's run in MLflow and those of its trials below it.

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
        self.children = TrackedChildren(self._open)

    def finish(self, results: list[TrialResult], files: list[Path]) -> None:
        """Send what the sweep found; register the best student."""
        from d3etr.tracking.sweeps import Swept

        for result in results:
            self._replay(result)
        self.children.close("KILLED")
        swept = {
            result.trial.number: Swept(
                result.trial.title(self._plan.sweep), result.mAP, result.run_dir
            )
            for result in results
            if result.state == "finished" and result.mAP is not None and result.run_dir is not None
        }
        missing = self._run.finish("FINISHED", list(swept.values()), files)
        if missing is not None:
            logger.warning("%s", missing)
        winner = best(results)
        if winner is not None:
            self._register(swept[winner.trial.number])

    def _replay(self, result: TrialResult) -> None:
        if result.run_dir is None or result.state == "unfinished":
            return
        finished = result.state == "finished"
        if not finished and not _was_broken_off(result.run_dir):
            return
        status: Status = "FAILED" if result.state == "failed" else "KILLED"
        title = result.trial.title(self._plan.sweep)
        self.children.replay(result.run_dir, title, "FINISHED" if finished else status)

    def how_to_open(self) -> list[str]:
        """What a person types and opens to see the trials in MLflow."""
        return self._run.how_to_open()

    def stopped(self, status: Status) -> None:
        """Send what there is; the same command goes on with the sweep's run."""
        self.children.close("KILLED")
        self._run.stopped(status)

    def _register(self, chosen: Swept) -> None:
        try:
            self._run.register_best(chosen)
        except Exception as error:
            logger.warning("the best student could not be registered: %s", error)

    def _open(self, config: Config, run_dir: Path, title: str) -> Tracker:
        from d3etr.tracking.runs import open_tracker

        return open_tracker(config, run_dir, parent_run=self._run.run_id, name=title)


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
