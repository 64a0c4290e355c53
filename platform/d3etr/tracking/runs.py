"""One MLflow run per run folder: opened, fed while training runs, finished, replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from d3etr.config.load import load_config
from d3etr.config.tree import Config
from d3etr.engine.journal import read_journal
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.progress import OnProgress, no_progress
from d3etr.text import bare_url
from d3etr.tracking.description import params, run_name, tags, trial_colour
from d3etr.tracking.open_run import Description, OpenRun, Status, open_run
from d3etr.tracking.results import Results
from d3etr.tracking.sender import Sender
from d3etr.tracking.server import first_line
from d3etr.tracking.state import read_state

logger = get_logger(__name__)


def open_tracker(
    config: Config,
    run_dir: Path,
    *,
    parent_run: str | None = None,
    name: str | None = None,
    ended: bool = False,
) -> Tracker:
    """Start the folder's MLflow run, or resume it if the folder has one.

    Args:
        config: the run's configuration.
        run_dir: its folder, which must exist.
        parent_run: id of the MLflow run that this one is listed under (a sweep's).
        name: what MLflow's table calls it; by default after the configuration.
        ended: nothing will be trained: a run that MLflow knows keeps the status that it has.

    Raises:
        UserError: MLflow does not answer (known within 15 seconds) or refuses.
    """
    folder = RunFolder(run_dir)
    ended = ended or all(file.is_file() for file in (folder.summary, folder.weights))
    below = {}
    if parent_run is not None:
        below = {"mlflow.parentRunId": parent_run, "mlflow.runColor": trial_colour(run_dir)}
    begun, _ = _begun_and_ended(run_dir)
    description = Description(
        name or run_name(config), lambda: tags(config, run_dir) | below, params(config), begun
    )
    run = open_run(config, run_dir, description, ended=ended)
    try:
        return Tracker(config, run)
    except Exception as error:  # the server went away between two requests
        reason = first_line(error)
        raise UserError(f"MLflow at {bare_url(run.uri)} refuses the run: {reason}") from error


def replay(run_dir: Path, report: Callable[[str], None] = logger.info) -> str | None:
    """Send what MLflow does not have yet of a run that ended; safe to repeat.

    Args:
        run_dir: a run folder with ``config.yaml`` and ``journal.jsonl``.
        report: takes a sentence about what was done.

    Returns:
        None when MLflow has everything, else what is missing and why, in one sentence.

    Raises:
        UserError: MLflow does not answer, or the folder holds no run.
    """
    config_file = RunFolder(run_dir).config
    if not config_file.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml")
    status = _status_to_report(run_dir)
    tracker = open_tracker(load_config(config_file, ()), run_dir, ended=True)
    missing = tracker.finish(status)
    if missing is None:
        report(f"MLflow run {tracker.run_id} has everything of {run_dir}")
    return missing


class Tracker:
    """Follows a run's journal into MLflow. ``finish`` never raises: training comes first."""

    def __init__(self, config: Config, run: OpenRun) -> None:
        self._config, self._run = config, run
        self._sender = Sender(
            run.client,
            run.run_id,
            RunFolder(run.folder).journal,
            lambda step: run.remember(sent_step=step),
        )

    @property
    def run_id(self) -> str:
        """Id of the MLflow run."""
        return self._run.run_id

    def finish(self, status: Status, on_progress: OnProgress = no_progress) -> str | None:
        """Send the rest of the journal, close the run, then send the results.

        The status never waits for the results: until all are there, tag ``missing`` names those
        that are not.

        Args:
            status: how the run ended.
            on_progress: takes a line about what is being sent.

        Returns:
            None when MLflow has everything, else one sentence: what is missing and how to send
            it later.
        """
        run = self._run
        run.remember(status=status)
        unsent: dict[str, str] = {}
        failure = self._sender.close()
        if failure is not None:
            unsent[f"metrics after step {max(0, run.state.sent_step)}"] = first_line(failure)
        lacks = run.close(
            status,
            Results(self._config, run).steps,
            ended=_begun_and_ended(run.folder)[1],
            missing=unsent,
            begin=lambda name: on_progress(f"sending results to MLflow: {name}"),
        )
        if lacks is None:
            run.remember(complete=True)
            return None
        return (
            f"MLflow at {bare_url(run.uri)} lacks of {run.folder.name}: {lacks}. Everything is "
            f"kept in {run.folder}: send it with 'python -m d3etr.tracking {run.folder}'"
        )


def _begun_and_ended(run_dir: Path) -> tuple[int | None, int | None]:
    """In milliseconds since 1970, so that a run that is sent late shows its own times."""
    times = [
        record["time"] for record in read_journal(RunFolder(run_dir).journal) if "time" in record
    ]
    if not times:
        return None, None
    # The clock may have been set back: a run does not end before it began.
    return int(1000 * times[0]), int(1000 * max(times[0], times[-1]))


def _status_to_report(run_dir: Path) -> Status:
    """How the run ended: what the folder remembers, else what its results show."""
    state = read_state(run_dir)
    for status in ("FINISHED", "FAILED", "KILLED"):
        if state is not None and state.status == status:
            return status
    return "FINISHED" if RunFolder(run_dir).summary.is_file() else "KILLED"
