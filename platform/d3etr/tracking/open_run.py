"""A folder's run in MLflow: made or found again, and ended whatever becomes of its results."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from mlflow.entities import Param
from mlflow.exceptions import MlflowException

from d3etr.config.tree import Config
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.progress import OnProgress, no_progress
from d3etr.text import bare_url
from d3etr.tracking.server import (
    UPLOAD_TIMEOUT_SECONDS,
    connect,
    first_line,
    open_experiment,
    patience,
    tracking_uri,
)
from d3etr.tracking.state import RunState, read_state, write_state

logger = get_logger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
Steps = Mapping[str, Callable[[], None]]
"""What sends something, by the name of what it sends."""
Answer = TypeVar("Answer")
MISSING = "missing"
"""Tag of a run whose status is final and whose results are not all there."""
CONFLICTS = ("unique constraint", "duplicate", "database is locked", "deadlock")
"""Texts of databases' errors where two processes write the same at the same moment."""
PAUSES_SECONDS = (0.1, 0.5, 2.0)
PARAMS_PER_REQUEST = 100


class OpenRun:
    """The MLflow run of a folder, which remembers it in ``mlflow_run.json``.

    It is started, or resumed if the folder has one.

    Args:
        config: where MLflow is.
        folder: of a run or a sweep, which must exist.
        name: in MLflow's table.
        tags: of the run; asked for only where it is made.
        params: of the run; those that it has already stay.
        begun: when, in milliseconds since 1970; None is now.
        ended: nothing will be added by training: a run that MLflow knows keeps its status.

    Attributes:
        client: of MLflow.
        uri: MLflow's address.
        folder: of the run.
        state: which MLflow run it is and what of it was sent.

    Raises:
        UserError: MLflow does not answer (known within 15 seconds) or refuses.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        name: str,
        tags: Callable[[], dict[str, str]],
        params: Mapping[str, str],
        *,
        begun: int | None = None,
        ended: bool = False,
    ) -> None:
        self.folder, self.uri = folder, tracking_uri(config)
        self.client = connect(self.uri)
        with self.refusals():
            experiment = open_experiment(self.client, config, self.uri)
            self.state = self._resumed(ended) or settled(
                lambda: self._made(experiment, name, tags(), begun)
            )
            settled(partial(self._complete_params, params))

    @property
    def run_id(self) -> str:
        """Id of the MLflow run."""
        return self.state.run_id

    @property
    def place(self) -> str:
        """MLflow's address as it may be shown."""
        return bare_url(self.uri)

    def remember(self, **changes: object) -> None:
        """Write changes of the state into the folder."""
        self.state = self.state.model_copy(update=changes)
        write_state(self.folder, self.state)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """What is asked of MLflow at the start of a run: patiently, its refusals as UserError."""
        with refusals(self.uri, "the run"), patience():
            yield

    def close(
        self,
        status: Status,
        results: Callable[[], Steps],
        *,
        ended: int | None = None,
        missing: Mapping[str, str] | None = None,
        on_progress: OnProgress = no_progress,
    ) -> str | None:
        """End the run, then send its results: the status never waits for them.

        Until all are there, tag ``missing`` names those that are not.

        Args:
            status: how it ended.
            results: steps that send the results, see ``attempt_all``; asked for once the run has
                ended.
            ended: when, in milliseconds since 1970; None is now.
            missing: what is known to be missing, with the reason.
            on_progress: takes a line about what is being sent.

        Returns:
            What MLflow lacks and why the first of it is; None if it has everything.
        """
        failures = dict(missing or {})
        tag = partial(self.client.set_tag, self.run_id, MISSING)
        end = partial(self.client.set_terminated, self.run_id, status, end_time=ended)
        closing = attempt_all({"tags": partial(tag, "results (not sent yet)"), "status": end})
        if "status" in closing:
            return _listed(failures | closing | {"results": "not tried"})
        failures |= attempt_all(results(), on_progress)
        clear = partial(self.client.delete_tag, self.run_id, MISSING)
        failures |= attempt_all({"tags": partial(tag, _listed(failures)) if failures else clear})
        return _listed(failures) if failures else None

    def _resumed(self, ended: bool) -> RunState | None:
        """The folder's run if this server still has it, set to running again unless it ended."""
        state = read_state(self.folder)
        if state is None:
            return None
        if state.tracking_uri != self.place:
            text = "%s was tracked at %s and is now sent to a new run at %s"
            logger.warning(text, self.folder, state.tracking_uri, self.place)
            return None
        try:
            gone = self.client.get_run(state.run_id).info.lifecycle_stage == "deleted"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            gone = True
        if gone:
            text = "MLflow run %s of %s is gone: starting a new one"
            logger.warning(text, state.run_id, self.folder)
            return None
        if not ended:
            self.client.update_run(state.run_id, status="RUNNING")
        status = state.status if ended else "RUNNING"
        stopped = {"stopped_early": ended and state.stopped_early}
        return state.model_copy(update={"status": status, "complete": False} | stopped)

    def _made(
        self, experiment: str, name: str, tags: dict[str, str], begun: int | None
    ) -> RunState:
        run = self.client.create_run(experiment, start_time=begun, tags=tags, run_name=name)
        state = RunState(tracking_uri=self.place, experiment_id=experiment, run_id=run.info.run_id)
        write_state(self.folder, state)
        return state

    def _complete_params(self, params: Mapping[str, str]) -> None:
        """Log the params that the run lacks: all of a new run, none of a resumed one."""
        known = self.client.get_run(self.run_id).data.params
        lacking = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(lacking), PARAMS_PER_REQUEST):
            self.client.log_batch(self.run_id, params=lacking[start : start + PARAMS_PER_REQUEST])


@contextmanager
def refusals(uri: str, what: str) -> Iterator[None]:
    """What MLflow refuses, as a UserError.

    Args:
        uri: MLflow's address.
        what: it is that is asked for.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MLflow raises its own, SQLAlchemy's and requests' errors
        reason = first_line(error)
        raise UserError(f"MLflow at {bare_url(uri)} refuses {what}: {reason}") from error


def attempt_all(steps: Steps, on_progress: OnProgress = no_progress) -> dict[str, str]:
    """Take every step; after one that waited in vain for an answer, none of the others.

    Returns:
        The steps that were not taken, with the reason.
    """
    failures: dict[str, str] = {}
    hopeless = False
    for name, step in steps.items():
        if hopeless:
            failures[name] = "not tried: nothing answers"
            continue
        on_progress(f"sending results to MLflow: {name}")
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
