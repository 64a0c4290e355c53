"""Reaching MLflow: which server, whether it answers, which experiment.

The embedded default is an SQLite file next to the runs. A server that is down is one clear
error at the start; MLflow's own defaults would block for four minutes.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from d3etr.config.tree import Config
from d3etr.errors import UserError
from d3etr.files import atomic_write, clear_disk_errors
from d3etr.text import bare_url, redacted
from d3etr.tracking.address import BEST_FIRST, embedded_uri, runs_page

PROBE_SECONDS = 8.0
"""How long a server may take to accept a connection: one that is just starting gets a chance."""
CONNECT_TIMEOUT_SECONDS = 2.0
ANSWER_TIMEOUT_SECONDS = 5
UPLOAD_TIMEOUT_SECONDS = 60
SQLITE = "sqlite:///"
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tells MLflow's pages that models are trained here: they show runs, not traces of chats."""
QUIET_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Commands print where to look once, at the end, with a page that reads well.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_LIMITS = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
_lock = threading.Lock()
_waiting: list[tuple[int, int]] = []
"""Seconds and retries of each thread that talks to MLflow now."""
_set_outside: set[str] = set()
"""Of the limits: those that the environment sets itself."""


def tracking_uri(config: Config) -> str:
    """Where the run is tracked: ``tracking.uri``, MLFLOW_TRACKING_URI, else an SQLite file."""
    chosen = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return chosen or embedded_uri(config.run.output)


@contextmanager
def patience(seconds: int = ANSWER_TIMEOUT_SECONDS, retries: int = 0) -> Iterator[None]:
    """Limits MLflow's waiting for a server, where the environment does not set them.

    Retries are 0 because the callers retry themselves and know what is safe to send twice.
    Where several threads wait at once, the most patient one decides.
    """
    _limit(_waiting.append, (seconds, retries))
    try:
        yield
    finally:
        _limit(_waiting.remove, (seconds, retries))


def _limit(change: Callable[[tuple[int, int]], None], ours: tuple[int, int]) -> None:
    """MLflow reads its limits from the environment, which all threads share."""
    with _lock:
        if not _waiting:
            _set_outside.clear()
            _set_outside.update(key for key in _LIMITS if key in os.environ)
        change(ours)
        for place, key in enumerate(_LIMITS):
            if key in _set_outside:
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
    try:
        if urlsplit(uri).scheme in ("http", "https"):
            _await_listener(uri)
        with patience():
            _make_database(uri)
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
    except UserError:
        raise
    except Exception as error:  # MLflow raises its own, SQLAlchemy's and requests' errors
        reason = first_line(error).replace(uri, "...")
        raise UserError(
            f"MLflow at {bare_url(uri)} cannot be used: {reason}. "
            "Start it ('mlflow server'), correct tracking.uri or MLFLOW_TRACKING_URI, "
            "or set tracking.enabled to false."
        ) from error
    return client


def first_line(error: Exception) -> str:
    """The error of MLflow, its stores or the network, without the trace that may follow."""
    text = redacted(str(error)).strip()
    return text.splitlines()[0][:200] if text else repr(error)


def open_experiment(client: MlflowClient, config: Config, uri: str) -> str:
    """Id of the configuration's experiment, which is made if it is missing.

    Raises:
        UserError: the experiment was deleted in MLflow.
    """
    name = config.tracking.experiment
    embedded = uri.startswith("sqlite")  # a server has an artifact location of its own
    artifacts = (config.run.output.resolve() / "mlartifacts").as_uri() if embedded else None
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            made = str(client.create_experiment(name, artifact_location=artifacts, tags=KIND))
        except MlflowException:  # another run made it in the meantime
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
        else:
            client.set_experiment_tag(made, "mlflow.note.content", _best_first(made))
            return made
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow experiment '{name}' was deleted. Restore it with "
            f"'mlflow experiments restore -x {found.experiment_id}', "
            "or set tracking.experiment to another name."
        )
    return str(found.experiment_id)


def _best_first(experiment: str) -> str:
    """The experiment's description: a link to its runs in another order than MLflow's.

    MLflow keeps the order of its table in the browser and in addresses, and nowhere on its server.
    """
    page = runs_page(experiment, "", BEST_FIRST)
    return f"[All runs, best validation mAP first]({page})"


def _await_listener(uri: str) -> None:
    parts = urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    deadline = time.monotonic() + PROBE_SECONDS
    while True:
        try:
            socket.create_connection((parts.hostname or "", port), CONNECT_TIMEOUT_SECONDS).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _make_database(uri: str) -> None:
    """Make the SQLite file of ``uri`` unless it is there; other addresses are left alone.

    MLflow would make its tables in the file itself, in more than a second; stopped in between,
    it would leave a file that it can neither use nor finish.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or _has_content(path):
        return
    with clear_disk_errors("MLflow's database", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _has_content(path):
                return
            # Of processes that died while they made the file: only the lock's holder makes one.
            for left in path.parent.glob(f".{path.name}.*.tmp*"):
                left.unlink(missing_ok=True)
            with atomic_write(path) as temporary:
                _make_tables(temporary)


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _make_tables(path: Path) -> None:
    # Half a second to import, and only needed where the file is missing.
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    try:
        store = SqlAlchemyStore(f"{SQLITE}{path}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
    except Exception as error:  # SQLAlchemy's or MLflow's around it: only the text says which
        if "disk is full" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    store.engine.dispose()  # no connection may outlive the file's name
