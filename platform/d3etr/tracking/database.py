"""The embedded database: an SQLite file that has all of MLflow's tables, or is not there.

MLflow makes its tables in the file itself, in more than a second; stopped in between, it leaves a
file that it can neither use nor finish.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from d3etr.files import atomic_write, clear_disk_errors

SCHEME = "sqlite:///"


def make_database(uri: str) -> None:
    """Make the SQLite file of ``uri`` unless it is there; other addresses are left alone.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    path = Path(uri.removeprefix(SCHEME))
    if not uri.startswith(SCHEME) or _is_there(path):
        return
    with clear_disk_errors("MLflow's database", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_there(path):
                _remove_leftovers(path)
                with atomic_write(path) as temporary:
                    _make_tables(temporary)


def half_made(uri: str) -> Path | None:
    """The SQLite file of ``uri``, if it lacks tables or migrations and no run is in it."""
    path = Path(uri.removeprefix(SCHEME))
    if not uri.startswith(SCHEME) or not path.is_file():
        return None
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            empty = "runs" not in tables or not database.execute("SELECT 1 FROM runs").fetchone()
    except sqlite3.DatabaseError:
        return None
    return path if empty else None


def _is_there(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _remove_leftovers(path: Path) -> None:
    """What processes that died while they made the file left: only the lock's holder makes one."""
    for left in path.parent.glob(f".{path.name}.*.tmp*"):
        left.unlink(missing_ok=True)


def _make_tables(path: Path) -> None:
    # Half a second to import, and only needed where the file is missing.
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    try:
        store = SqlAlchemyStore(f"{SCHEME}{path}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
    except Exception as error:  # SQLAlchemy's or MLflow's around it: only the text says which
        if "disk is full" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    store.engine.dispose()  # no connection may outlive the file's name
