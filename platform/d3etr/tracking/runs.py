"""One MLflow run per run folder: opened, fed while training runs, finished, replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from mlflow.entities import Param, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from d3etr.config.load import load_config
from d3etr.config.tree import Config
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.text import bare_url, redacted
from d3etr.tracking.artifacts import log_results
from d3etr.tracking.description import params, run_name, tags, trial_colour
from d3etr.tracking.metrics import Record
from d3etr.tracking.sender import Sender, known_marks
from d3etr.tracking.server import (
    artifact_folder,
    connect,
    open_experiment,
    patience,
    tracking_uri,
)
from d3etr.tracking.state import RunState, read_state, write_state
from d3etr.training.journal import read_journal

logger = get_logger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
JOURNAL = "journal.jsonl"
PARAMS_PER_REQUEST = 100
UPLOAD_TIMEOUT_SECONDS = 60


def open_tracker(
    config: Config, run_dir: Path, *, parent_run: str | None = None, name: str | None = None
) -> Tracker:
    """Start the folder's MLflow run, or go on with it if the folder has one.

    Args:
        config: the run's configuration.
        run_dir: its folder, which must exist.
        parent_run: id of the MLflow run that this one is listed under (a sweep's).
        name: what MLflow's table calls it; by default what the configuration says it is.

    Raises:
        UserError: MLflow does not answer (known within 15 seconds) or refuses.
    """
    uri = tracking_uri(config)
    client = connect(uri)
    try:
        with patience():
            experiment = open_experiment(
                client, config.tracking.experiment, artifact_folder(config, uri)
            )
            state = _existing(client, run_dir, uri) or _create(
                client, config, run_dir, experiment, parent_run, name, uri
            )
            _complete_params(client, state.run_id, config)
    except MlflowException as error:
        raise UserError(f"MLflow at {bare_url(uri)} refuses the run: {error}") from error
    return Tracker(client, config, run_dir, state, uri)


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
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml")
    status = _status_to_report(run_dir)
    tracker = open_tracker(load_config(config_file, ()), run_dir)
    missing = tracker.finish(status)
    if missing is None:
        report(f"MLflow run {tracker.run_id} has everything of {run_dir}")
    return missing


class Tracker:
    """An open MLflow run. No method raises because of MLflow: training comes first."""

    def __init__(
        self, client: MlflowClient, config: Config, run_dir: Path, state: RunState, uri: str
    ) -> None:
        self._client = client
        self._config = config
        self._run_dir = run_dir
        self._state = state
        self._uri = uri
        with patience():
            marks = known_marks(client, state.run_id)
        self._sender = Sender(client, state.run_id, marks, self._remember)

    @property
    def run_id(self) -> str:
        """Id of the MLflow run."""
        return self._state.run_id

    @property
    def experiment_id(self) -> str:
        """Id of its experiment."""
        return self._state.experiment_id

    def consume(self, record: Record) -> None:
        """Take a journal record; returns at once and never raises."""
        self._sender.put(record)

    def finish(self, status: Status) -> str | None:
        """Send the rest of the journal and the results, then close the run.

        Returns:
            None when MLflow has everything, else one sentence that says what is missing and
            how to send it later.
        """
        self._update(status=status)
        failure = self._sender.close(read_journal(self._run_dir / JOURNAL))
        if failure is None:
            failure = self._close_run(status)
        if failure is None:
            self._update(complete=True)
            return None
        return self._what_is_missing(failure)

    def _close_run(self, status: Status) -> Exception | None:
        try:
            with patience(UPLOAD_TIMEOUT_SECONDS, retries=1):
                self._state = log_results(
                    self._client, self._config, self._run_dir, self._state, self._uri
                )
                write_state(self._run_dir, self._state)
                ended = _journal_milliseconds(self._run_dir, -1)
                self._client.set_terminated(self.run_id, status, end_time=ended)
        except Exception as error:  # whatever MLflow, its artifact stores or the network raise
            logger.debug("MLflow could not be told the results", exc_info=True)
            return error
        return None

    def _what_is_missing(self, failure: Exception) -> str:
        reason = (redacted(str(failure)).strip().splitlines() or [type(failure).__name__])[0][:200]
        return (
            f"MLflow at {bare_url(self._uri)} has metrics up to step "
            f"{max(0, self._sender.last_step)} only and lacks the results ({reason}); everything "
            f"is kept in {self._run_dir}: send it with 'python -m d3etr.tracking {self._run_dir}'"
        )

    def _remember(self, step: int) -> None:
        self._update(sent_step=step)

    def _update(self, **changes: object) -> None:
        self._state = self._state.model_copy(update=changes)
        write_state(self._run_dir, self._state)


def _existing(client: MlflowClient, run_dir: Path, uri: str) -> RunState | None:
    """The folder's run if this server still has it, set to running again."""
    state = read_state(run_dir)
    if state is None:
        return None
    if state.tracking_uri != bare_url(uri):
        logger.warning(
            "%s was tracked at %s and is now sent to a new run at %s",
            run_dir,
            state.tracking_uri,
            bare_url(uri),
        )
        return None
    run = _get_run(client, state.run_id)
    if run is None or run.info.lifecycle_stage == "deleted":
        logger.warning("MLflow run %s of %s is gone: starting a new one", state.run_id, run_dir)
        return None
    client.update_run(state.run_id, status="RUNNING")
    return state.model_copy(update={"status": "RUNNING", "complete": False})


def _get_run(client: MlflowClient, run_id: str) -> Run | None:
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _create(
    client: MlflowClient,
    config: Config,
    run_dir: Path,
    experiment: str,
    parent_run: str | None,
    name: str | None,
    uri: str,
) -> RunState:
    named = tags(config, run_dir)
    if parent_run is not None:
        named |= {"mlflow.parentRunId": parent_run, "mlflow.runColor": trial_colour(run_dir)}
    begun = _journal_milliseconds(run_dir, 0)
    shown = name or run_name(config)
    run = client.create_run(experiment, start_time=begun, tags=named, run_name=shown)
    state = RunState(tracking_uri=bare_url(uri), experiment_id=experiment, run_id=run.info.run_id)
    write_state(run_dir, state)
    return state


def _journal_milliseconds(run_dir: Path, place: int) -> int | None:
    """When a record was written, so that a run that is sent late shows its own times."""
    journal = read_journal(run_dir / JOURNAL)
    return int(1000 * journal[place]["time"]) if journal else None


def _complete_params(client: MlflowClient, run_id: str, config: Config) -> None:
    """Log the params that the run lacks: all of a new run, none of a resumed one."""
    known = client.get_run(run_id).data.params
    lacking = [Param(key, value) for key, value in params(config).items() if key not in known]
    for start in range(0, len(lacking), PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=lacking[start : start + PARAMS_PER_REQUEST])


def _status_to_report(run_dir: Path) -> Status:
    """How the run ended: what the folder remembers, else what its results show."""
    state = read_state(run_dir)
    for status in ("FINISHED", "FAILED", "KILLED"):
        if state is not None and state.status == status:
            return status
    return "FINISHED" if (run_dir / "summary.json").is_file() else "KILLED"
