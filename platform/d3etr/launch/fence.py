"""A worker's tie to its driver: it leaves when the run is no longer its driver's.

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

from d3etr.launch.lock import lock_path, read_owner
from d3etr.launch.notes import Notes
from d3etr.logs import get_logger

logger = get_logger(__name__)

WATCH_SECONDS = 1.0
LINGER_SECONDS = 15.0
"""A worker that still trains so long after another one has said why the run must end, ends."""


class Fence:
    """Ends this process when its driver lost the run, or when the run's end left it hanging.

    Args:
        run_dir: the run's folder.
        token: identity of the worker's driver in the folder's lock.
        notes: where workers say why the run must end.
    """

    def __init__(self, run_dir: Path, token: str, notes: Notes) -> None:
        self._lock = lock_path(run_dir)
        self._token = token
        self._notes = notes
        self._noted_at: float | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fence", daemon=True)

    def __enter__(self) -> Fence:
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
                _leave("the run folder's lock is not held by this worker's driver any more")
            if self._hangs():
                _leave("the run must end and this worker hangs")

    def _ours(self) -> bool:
        try:
            owner = read_owner(self._lock)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return owner is None or owner.token == self._token

    def _hangs(self) -> bool:
        if self._noted_at is None and self._notes.reason_file.exists():
            self._noted_at = time.monotonic()
        return self._noted_at is not None and time.monotonic() > self._noted_at + LINGER_SECONDS


def _leave(reason: str) -> None:
    """End the process, also while it waits inside a collective operation."""
    logger.error("worker %d ends: %s", os.getpid(), reason)
    logging.shutdown()
    os._exit(1)
