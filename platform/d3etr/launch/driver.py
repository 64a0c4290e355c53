"""The driver's side of a run, the same under every launcher.

The driver owns the run's folder, holds its lock, follows its journal for people and for
tracking, and hands the training itself to a launcher.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from d3etr.config.tree import Config
from d3etr.engine.find_run import absolute_paths, ensure_same_recipe, prepare
from d3etr.engine.provenance import Inputs
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import RunFailedError as RunFailedError
from d3etr.errors import UserError
from d3etr.launch.display import Display, JournalFollower
from d3etr.launch.lock import RunLock
from d3etr.launch.process import terminable
from d3etr.logs import get_logger
from d3etr.progress import OnProgress

logger = get_logger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """Follows the journal and takes it somewhere where runs are compared."""

    @property
    def run_id(self) -> str:
        """Id of the tracked run."""
        ...

    def finish(self, status: Status, on_progress: OnProgress = ..., /) -> str | None:
        """Send what is left; a sentence about what is missing, or None."""
        ...


OpenTracker = Callable[[Config, Path], Tracker]


@dataclass(frozen=True)
class RunResult:
    """What a run hands over.

    Attributes:
        run_dir: its folder.
        metrics: final metrics, as in summary.json; mAP as fractions.
        weights: the trained student.
        tracked_run: id of the run in MLflow, None if it was not tracked.
        trained: False if the run was finished before and nothing had to be done.
    """

    run_dir: Path
    metrics: dict[str, float]
    weights: Path
    tracked_run: str | None
    trained: bool


class RunInterrupted(KeyboardInterrupt):
    """A run, or a sweep, was stopped from outside; the same command goes on with it."""

    def __init__(self, folder: Path, script: str = "trainers/run.py") -> None:
        super().__init__(
            f"interrupted; {folder} keeps what was trained. The same command goes on with it, and "
            f"so does: python {script} --resume {folder}"
        )


@dataclass(frozen=True)
class Launch:
    """What a launcher needs to know to train.

    Attributes:
        config: the configuration, with absolute paths.
        run_dir: the run's folder.
        token: identity of the driver that holds the folder's lock.
        on_progress: takes what is being waited for.
        later: takes what is to be closed only once all results are written and sent.
    """

    config: Config
    run_dir: Path
    token: str
    on_progress: OnProgress
    later: ExitStack


Launcher = Callable[[Launch], Callable[[], None]]
"""Makes everything ready that training needs, or raises; what it returns trains until the end."""


def drive(
    config: Config,
    folder: RunFolder,
    launcher: Launcher,
    *,
    display: Display,
    open_tracker: OpenTracker | None,
) -> RunResult:
    """Bring a run to its end: start it, go on with it, or return what it gave.

    Args:
        config: what to train.
        folder: where.
        launcher: makes ready what training needs.
        display: shows progress.
        open_tracker: starts tracking; None tracks nothing.

    Raises:
        UserError: something that the user can fix; nothing half-written is left.
        RunFailedError: training broke.
        RunInterrupted: Ctrl-C or a termination signal.
    """
    kept = folder.read_config()
    if kept is None:
        prepare(folder, config)
    else:
        ensure_same_recipe(folder, kept, config)
    lock = RunLock(folder.path)
    try:
        with terminable(), lock, ExitStack() as later:
            placed, token = absolute_paths(config), lock.owner.token
            launch = Launch(placed, folder.path, token, display.on_progress, later)
            return _locked_run(launch, folder, launcher, display, open_tracker)
    except KeyboardInterrupt:
        if lock.lost:
            raise UserError(f"stopped: another run took over {folder.path}") from None
        raise RunInterrupted(folder.path) from None
    finally:
        display.close()


def _locked_run(
    launch: Launch,
    folder: RunFolder,
    launcher: Launcher,
    display: Display,
    open_tracker: OpenTracker | None,
) -> RunResult:
    trained = folder.result() is None
    if not trained:
        Inputs().ensure_result_is_of(launch.config, folder.path)
    train = launcher(launch) if trained else None
    if train is not None:  # a damaged result's: that it is there would say "finished" to launchers
        folder.summary.unlink(missing_ok=True)
    # Not before: a run that cannot begin leaves no failed one where runs are compared.
    tracker = None if open_tracker is None else open_tracker(launch.config, folder.path)
    if train is not None:
        _train(train, folder, display, tracker)
    elif tracker is not None:
        _finish(tracker, "FINISHED", display)
    metrics = folder.result()
    if metrics is None:
        raise RunFailedError(f"training ended without {folder.summary} and {folder.weights.name}")
    tracked_run = None if tracker is None else tracker.run_id
    return RunResult(folder.path, metrics, folder.weights, tracked_run, trained)


def _train(
    train: Callable[[], None], folder: RunFolder, display: Display, tracker: Tracker | None
) -> None:
    follower = JournalFollower(folder.journal, display)
    follower.start()
    status: Status = "FAILED"
    try:
        train()
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except Exception as error:
        if folder.result() is None:
            raise
        logger.warning("the run is finished, though what trained it did not end well: %s", error)
        status = "FINISHED"
    finally:
        follower.stop()
        if tracker is not None:
            _finish(tracker, status, display)


def _finish(tracker: Tracker, status: Status, display: Display) -> None:
    """Close the tracked run; a failure is a warning, and changes nothing for the run."""
    display.on_progress("sending results to MLflow")
    try:
        missing = tracker.finish(status, display.on_progress)
    except Exception as error:
        missing = f"tracking failed at the end of the run: {error!r}"
    if missing is not None:
        logger.warning("%s", missing)
