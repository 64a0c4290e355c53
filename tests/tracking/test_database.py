"""The embedded database survives whatever ends the process that makes it."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from d3etr.errors import UserError
from d3etr.tracking.server import connect

START_SECONDS = 120
"""A busy machine takes long to import MLflow."""
PROCESSES: ForkServerContext = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["d3etr.tracking.server", "mlflow.store.tracking.sqlalchemy_store"]
)


def uri_of(database: Path) -> str:
    return f"sqlite:///{database}"


def start_making(database: Path) -> ForkServerProcess:
    making = PROCESSES.Process(target=connect, args=(uri_of(database),))
    making.start()
    return making


def wait_until_it_is_being_made(folder: Path, known: set[Path]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not any(".tmp" in path.name for path in set(folder.iterdir()) - known):
        assert time.monotonic() < deadline, "the database was not begun"
        time.sleep(0.005)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes of a file fail, as they do on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.slow
def test_a_database_whose_making_is_killed_is_made_by_the_next_run(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    for delay in (0.0, 0.2, 0.6):
        known = set(tmp_path.iterdir())
        making = start_making(database)
        wait_until_it_is_being_made(tmp_path, known)
        time.sleep(delay)
        making.kill()
        making.join()
        assert not database.exists()
    both = [start_making(database), start_making(database)]
    for making in both:
        making.join(START_SECONDS)
    assert [making.exitcode for making in both] == [0, 0]
    assert MlflowClient(tracking_uri=uri_of(database)).get_experiment_by_name("Default")
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_a_database_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    with files_limited_to(100_000), pytest.raises(UserError, match=r"cannot be used: .*disk"):
        connect(uri_of(database))
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db.lock"]
