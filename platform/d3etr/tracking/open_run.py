"""A folder's run in MLflow: made or found again, and ended whatever becomes of its results."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from mlflow.entities import Param, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from d3etr.config.tree import Config
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.text import bare_url
from d3etr.tracking.server import (
    UPLOAD_TIMEOUT_SECONDS,
    artifact_folder,
    connect,
    first_line,
    open_experiment,
    patience,
    tracking_uri,
)
from d3etr.tracking.state import RunState, read_state, write_state

logger = get_logger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
Answer = TypeVar("Answer")
MISSING = "missing"
"""Tag of a run whose status is final and whose results are not all there."""
CONFLICTS = ("unique constraint", "duplicate", "database is locked", "deadlock")
"""Texts of databases' errors where two processes write the same at the same moment."""
PAUSES_SECONDS = (0.1, 0.5, 2.0)
PARAMS_PER_REQUEST = 100


@dataclass(frozen=True)
class Description:
    """What a run that is made is called and carries.

    Attributes:
        name: in MLflow's table.
        tags: of the run; asked for only where a run is made.
        params: of the run; those that it has already stay.
        begun: when, in milliseconds since 1970; None is now.
    """

    name: str
    tags: Callable[[], dict[str, str]]
    params: Mapping[str, str]
    begun: int | None = None


class OpenRun:
    """The MLflow run of a folder, which remembers it in ``mlflow_run.json``.

    Attributes:
        client: of MLflow.
        uri: MLflow's address.
        folder: of the run.
        state: which MLflow run it is and what of it was sent.
    """

    def __init__(self, client: MlflowClient, uri: str, folder: Path, state: RunState) -> None:
        self.client, self.uri, self.folder, self.state = client, uri, folder, state

    @property
    def run_id(self) -> str:
        """Id of the MLflow run."""
        return self.state.run_id

    def remember(self, **changes: object) -> None:
        """Write changes of the state into the folder."""
        self.state = self.state.model_copy(update=changes)
        write_state(self.folder, self.state)

    def close(
        self,
        status: Status,
        results: Callable[[], Mapping[str, Callable[[], None]]],
        *,
        ended: int | None = None,
        missing: Mapping[str, str] | None = None,
        begin: Callable[[str], None] = lambda name: None,
    ) -> str | None:
        """End the run, then send its results: the status never waits for them.

        Until all are there, tag ``missing`` names those that are not.

        Args:
            status: how it ended.
            results: steps that send the results, see ``attempt_all``; asked for once the run has
                ended.
            ended: when, in milliseconds since 1970; None is now.
            missing: what is known to be missing, with the reason.
            begin: called with a result's name before it is sent.

        Returns:
            What MLflow lacks and why the first of it is; None if it has everything.
        """
        failures = dict(missing or {})
        tag = partial(self.client.set_tag, self.run_id, MISSING)
        end = partial(self.client.set_terminated, self.run_id, status, end_time=ended)
        closing = attempt_all({"tags": partial(tag, "results (not sent yet)"), "status": end})
        if "status" in closing:
            return _listed(failures | closing | {"results": "not tried"})
        failures |= attempt_all(results(), begin)
        clear = partial(self.client.delete_tag, self.run_id, MISSING)
        failures |= attempt_all({"tags": partial(tag, _listed(failures)) if failures else clear})
        return _listed(failures) if failures else None


def open_run(
    config: Config, folder: Path, description: Description, *, ended: bool = False
) -> OpenRun:
    """Start the folder's MLflow run, or resume it if the folder has one.

    Args:
        config: where MLflow is.
        folder: of a run or a sweep, which must exist.
        description: of the run where it has to be made.
        ended: nothing will be added by training: a run that MLflow knows keeps its status.

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
            state = _existing(client, folder, uri, ended) or settled(
                partial(_create, client, folder, uri, experiment, description)
            )
            settled(partial(_complete_params, client, state.run_id, description.params))
    except UserError:
        raise
    except Exception as error:  # MLflow raises its own, SQLAlchemy's and requests' errors
        reason = first_line(error)
        raise UserError(f"MLflow at {bare_url(uri)} refuses the run: {reason}") from error
    return OpenRun(client, uri, folder, state)


def _existing(client: MlflowClient, folder: Path, uri: str, ended: bool) -> RunState | None:
    """The folder's run if this server still has it, set to running again unless it has ended."""
    state = read_state(folder)
    if state is None:
        return None
    if state.tracking_uri != bare_url(uri):
        logger.warning(
            "%s was tracked at %s and is now sent to a new run at %s",
            folder,
            state.tracking_uri,
            bare_url(uri),
        )
        return None
    run = _get_run(client, state.run_id)
    if run is None or run.info.lifecycle_stage == "deleted":
        logger.warning("MLflow run %s of %s is gone: starting a new one", state.run_id, folder)
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
    client: MlflowClient, folder: Path, uri: str, experiment: str, description: Description
) -> RunState:
    run = client.create_run(
        experiment,
        start_time=description.begun,
        tags=description.tags(),
        run_name=description.name,
    )
    state = RunState(tracking_uri=bare_url(uri), experiment_id=experiment, run_id=run.info.run_id)
    write_state(folder, state)
    return state


def _complete_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    """Log the params that the run lacks: all of a new run, none of a resumed one."""
    known = client.get_run(run_id).data.params
    lacking = [Param(key, value) for key, value in params.items() if key not in known]
    for start in range(0, len(lacking), PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=lacking[start : start + PARAMS_PER_REQUEST])


def attempt_all(
    steps: Mapping[str, Callable[[], None]], begin: Callable[[str], None] = lambda name: None
) -> dict[str, str]:
    """Take every step; after one that waited in vain for an answer, none of the others.

    Args:
        steps: by the name of what they send.
        begin: called with the name before each.

    Returns:
        The steps that were not taken, with the reason.
    """
    failures: dict[str, str] = {}
    hopeless = False
    for name, step in steps.items():
        if hopeless:
            failures[name] = "not tried: nothing answers"
            continue
        begin(name)
        begun = time.monotonic()
        try:
            with patience(UPLOAD_TIMEOUT_SECONDS, retries=1):
                settled(step)
        except Exception as error:  # whatever MLflow, its artifact stores or the network raise
            logger.debug("MLflow did not take %s", name, exc_info=True)
            failures[name] = first_line(error)
            hopeless = time.monotonic() - begun > UPLOAD_TIMEOUT_SECONDS
    return failures


def settled(action: Callable[[], Answer]) -> Answer:
    """What ``action`` returns; repeated where another process wrote the same just then."""
    for pause in PAUSES_SECONDS:
        try:
            return action()
        except Exception as error:
            if not any(text in str(error).lower() for text in CONFLICTS):
                raise
        time.sleep(pause * random.uniform(0.5, 1.5))
    return action()


def _listed(failures: Mapping[str, str]) -> str:
    """``weights, model (no space left)``: what is missing, and why the first of it is."""
    return f"{', '.join(failures)} ({next(iter(failures.values()))})"
