"""Ends a worker whose driver is gone or has lost the run.

When a driver is killed, Ray's workers go on for some seconds. A second driver that takes the
run over in that time must not find two writers in one folder, so each worker watches the lock.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from d3etr.engine.run_folder import RunFolder
from d3etr.launch.control_files import ControlFiles
from d3etr.launch.lock import read_owner
from d3etr.logs import get_logger

logger = get_logger(__name__)

WATCH_SECONDS = 1.0
LINGER_SECONDS = 15.0
"""A worker that still trains so long after the run was to end hangs, and is ended."""


class WorkerWatchdog:
    """Ends this process when its driver lost the run, or when the run's end left it hanging.

    Args:
        run_dir: the run's folder.
        token: identity of the worker's driver in the folder's lock.
        control: where workers write why the run must end.
    """

    def __init__(self, run_dir: Path, token: str, control: ControlFiles) -> None:
        self._lock = RunFolder(run_dir).lock
        self._token = token
        self._control = control
        self._end_since: float | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> WorkerWatchdog:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()

    def _watch(self) -> None:
        foreign = 0
        while not self._done.wait(WATCH_SECONDS):
            # Seen twice: a rename on shared storage may hide the file for a moment.
            foreign = 0 if self._ours() else foreign + 1
            if foreign >= 2:
                _exit("the run folder's lock is not held by this worker's driver any more")
            if self._hangs():
                _exit("the run must end and this worker hangs")

    def _ours(self) -> bool:
        try:
            owner = read_owner(self._lock)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return owner is None or owner.token == self._token

    def _hangs(self) -> bool:
        if self._end_since is None and self._control.reason_file.exists():
            self._end_since = time.monotonic()
        return self._end_since is not None and time.monotonic() > self._end_since + LINGER_SECONDS


def _exit(reason: str) -> None:
    """End the process, also while it waits inside a collective operation."""
    logger.error("worker %d ends: %s", os.getpid(), reason)
    logging.shutdown()
    os._exit(1)
