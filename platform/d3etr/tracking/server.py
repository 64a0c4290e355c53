"""Reaching MLflow: which server, whether it answers, which experiment.

The embedded default is an SQLite file next to the runs. A server that is down is one clear
error at the start; MLflow's own defaults would block for four minutes.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from d3etr.config.tree import Config
from d3etr.errors import UserError
from d3etr.text import bare_url, redacted
from d3etr.tracking.address import embedded_uri
from d3etr.tracking.database import half_made, make_database

PROBE_SECONDS = 8.0
"""How long a server may take to accept a connection: one that is just starting gets a chance."""
CONNECT_TIMEOUT_SECONDS = 2.0
ANSWER_TIMEOUT_SECONDS = 5
UPLOAD_TIMEOUT_SECONDS = 60
_PATIENCE_KEYS = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
_patience_lock = threading.Lock()
_waiting: list[tuple[int, int]] = []
"""Seconds and retries of each thread that talks to MLflow now."""
_given: dict[str, str | None] = {}
"""The environment before."""
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tells MLflow's pages that models are trained here: they show runs, not traces of chats."""
QUIET_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Commands print where to look once, at the end, with a page that reads well.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def tracking_uri(config: Config) -> str:
    """Where the run is tracked: ``tracking.uri``, MLFLOW_TRACKING_URI, else an SQLite file."""
    chosen = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return chosen or embedded_uri(config.run.output)


def artifact_folder(config: Config, uri: str) -> str | None:
    """Artifact location of a new experiment; None where the server has its own."""
    if not uri.startswith("sqlite"):
        return None
    return (config.run.output.resolve() / "mlartifacts").as_uri()


@contextmanager
def patience(seconds: int = ANSWER_TIMEOUT_SECONDS, retries: int = 0) -> Iterator[None]:
    """Limits MLflow's waiting for a server, where the environment does not set them.

    Retries are 0 because the callers retry themselves and know what is safe to send twice.
    Where several threads wait at once, the most patient one decides.
    """
    ours = (seconds, retries)
    with _patience_lock:
        if not _waiting:
            _given.update({key: os.environ.get(key) for key in _PATIENCE_KEYS})
        _waiting.append(ours)
        _apply_patience()
    try:
        yield
    finally:
        with _patience_lock:
            _waiting.remove(ours)
            _apply_patience()


def _apply_patience() -> None:
    """MLflow reads its limits from the environment, which all threads share."""
    for place, key in enumerate(_PATIENCE_KEYS):
        if _given[key] is not None:
            continue
        if _waiting:
            os.environ[key] = str(max(each[place] for each in _waiting))
        else:
            os.environ.pop(key, None)


def connect(uri: str) -> MlflowClient:
    """A client of ``uri`` that is known to answer.

    Raises:
        UserError: nothing answers there, or it is not MLflow.
    """
    for switch, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(switch, value)
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if urlsplit(uri).scheme in ("http", "https"):
        _await_listener(uri)
    try:
        with patience():
            make_database(uri)
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
    except UserError:
        raise
    except Exception as error:  # MLflow raises its own, SQLAlchemy's and requests' errors
        raise UserError(_no_answer(uri, first_line(error))) from error
    return client


def first_line(error: Exception) -> str:
    """The error of MLflow, its stores or the network, without the trace that may follow."""
    text = redacted(str(error)).strip()
    return text.splitlines()[0][:200] if text else repr(error)


def open_experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Id of the experiment called ``name``, which is made if it is missing.

    Raises:
        UserError: the experiment was deleted in MLflow.
    """
    with patience():
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                made = client.create_experiment(name, artifact_location=artifacts, tags=KIND)
                return str(made)
            except MlflowException:  # another run made it in the meantime
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow experiment '{name}' was deleted. Restore it with "
            f"'mlflow experiments restore -x {found.experiment_id}', "
            "or set tracking.experiment to another name."
        )
    return str(found.experiment_id)


def _await_listener(uri: str) -> None:
    parts = urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    deadline = time.monotonic() + PROBE_SECONDS
    while True:
        try:
            socket.create_connection((parts.hostname or "", port), CONNECT_TIMEOUT_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(_no_answer(uri, str(error))) from error
            time.sleep(0.5)


def _no_answer(uri: str, reason: str) -> str:
    unfinished = half_made(uri)
    if unfinished is not None:
        return (
            f"MLflow's database {unfinished} was never finished, since the process that made it "
            "was stopped; no run is in it. Delete it and run the same command again."
        )
    return (
        f"MLflow at {bare_url(uri)} cannot be used: {reason.replace(uri, '...')}. "
        "Start it ('mlflow server'), correct tracking.uri or MLFLOW_TRACKING_URI, "
        "or set tracking.enabled to false."
    )
