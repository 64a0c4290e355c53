"""One MLflow run per run folder: opened, fed while training runs, finished, replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from mlflow.entities import Param, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from d3etr.config.load import load_config
from d3etr.config.tree import Config
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.text import bare_url
from d3etr.tracking.artifacts import WEIGHTS, Results
from d3etr.tracking.description import params, run_name, tags, trial_colour
from d3etr.tracking.metrics import Record
from d3etr.tracking.sender import Sender, known_marks
from d3etr.tracking.server import (
    artifact_folder,
    connect,
    first_line,
    open_experiment,
    patience,
    tracking_uri,
)
from d3etr.tracking.state import RunState, read_state, write_state
from d3etr.tracking.steps import Status, close_run, listed, settled
from d3etr.training.journal import read_journal

logger = get_logger(__name__)

JOURNAL = "journal.jsonl"
PARAMS_PER_REQUEST = 100


def open_tracker(
    config: Config,
    run_dir: Path,
    *,
    parent_run: str | None = None,
    name: str | None = None,
    ended: bool = False,
) -> Tracker:
    """Start the folder's MLflow run, or go on with it if the folder has one.

    Args:
        config: the run's configuration.
        run_dir: its folder, which must exist.
        parent_run: id of the MLflow run that this one is listed under (a sweep's).
        name: what MLflow's table calls it; by default what the configuration says it is.
        ended: nothing will be trained: a run that MLflow knows keeps the status that it has.

    Raises:
        UserError: MLflow does not answer (known within 15 seconds) or refuses.
    """
    ended = ended or all((run_dir / name).is_file() for name in ("summary.json", WEIGHTS))
    uri = tracking_uri(config)
    client = connect(uri)
    try:
        with patience():
            experiment = open_experiment(
                client, config.tracking.experiment, artifact_folder(config, uri)
            )
            state = _existing(client, run_dir, uri, ended) or settled(
                partial(_create, client, config, run_dir, experiment, parent_run, name, uri)
            )
            settled(partial(_complete_params, client, state.run_id, config))
            return Tracker(client, config, run_dir, state, uri)
    except UserError:
        raise
    except Exception as error:  # MLflow raises its own, SQLAlchemy's and requests' errors
        reason = first_line(error)
        raise UserError(f"MLflow at {bare_url(uri)} refuses the run: {reason}") from error


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
    tracker = open_tracker(load_config(config_file, ()), run_dir, ended=True)
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

    def finish(
        self, status: Status, stage: Callable[[str], None] = lambda text: None
    ) -> str | None:
        """Send the rest of the journal, close the run, then send the results.

        The status never waits for the results: until all are there, tag ``missing`` names those
        that are not.

        Args:
            status: how the run ended.
            stage: takes a line about what is being sent.

        Returns:
            None when MLflow has everything, else one sentence that says what is missing and
            how to send it later.
        """
        self._update(status=status)
        missing: dict[str, str] = {}
        failure = self._sender.close(read_journal(self._run_dir / JOURNAL))
        if failure is not None:
            sent = max(0, self._sender.last_step)
            missing[f"metrics after step {sent}"] = first_line(failure)
        results = Results(self._client, self._config, self._run_dir, self._uri, self._state)
        missing = close_run(
            self._client,
            self.run_id,
            status,
            results.steps,
            ended=_begun_and_ended(self._run_dir)[1],
            missing=missing,
            begin=lambda name: stage(f"sending results to MLflow: {name}"),
        )
        self._state = results.state
        if not missing:
            self._update(complete=True)
            return None
        return self._what_is_missing(missing)

    def _what_is_missing(self, missing: Mapping[str, str]) -> str:
        return (
            f"MLflow at {bare_url(self._uri)} lacks of {self._run_dir.name}: "
            f"{listed(missing)}. Everything is kept in {self._run_dir}: send it with "
            f"'python -m d3etr.tracking {self._run_dir}'"
        )

    def _remember(self, step: int) -> None:
        self._update(sent_step=step)

    def _update(self, **changes: object) -> None:
        self._state = self._state.model_copy(update=changes)
        write_state(self._run_dir, self._state)


def _existing(client: MlflowClient, run_dir: Path, uri: str, ended: bool) -> RunState | None:
    """The folder's run if this server still has it, set to running again unless it has ended."""
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
    if ended:
        return state.model_copy(update={"complete": False})
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
    begun, _ = _begun_and_ended(run_dir)
    shown = name or run_name(config)
    run = client.create_run(experiment, start_time=begun, tags=named, run_name=shown)
    state = RunState(tracking_uri=bare_url(uri), experiment_id=experiment, run_id=run.info.run_id)
    write_state(run_dir, state)
    return state


def _begun_and_ended(run_dir: Path) -> tuple[int | None, int | None]:
    """In milliseconds since 1970, so that a run that is sent late shows its own times."""
    times = [record["time"] for record in read_journal(run_dir / JOURNAL) if "time" in record]
    if not times:
        return None, None
    # The clock may have been set back: a run does not end before it began.
    return int(1000 * times[0]), int(1000 * max(times[0], times[-1]))


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
