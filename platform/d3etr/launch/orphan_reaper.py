"""Ends the processes of a Ray that a driver started, right after the driver: some stay a minute.

The driver may be killed at any moment, so this is a program of its own that outlives it:
``orphan_reaper.py DRIVER MARK``. It finds the processes by a variable of their environment, which
they inherit from each other. Only the standard library is used, and Linux's /proc.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

VARIABLE = "D3ETR_RAY_OF_DRIVER"
POLL_SECONDS = 0.05
REAP_SECONDS = 10.0
"""So long, processes that start meanwhile are looked for again."""


class OrphanReaper:
    """A process that waits for the end of this one.

    Attributes:
        environment: variables for the processes that are to end with this one; none where the
            system is not Linux.
    """

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}
        self._reaper: subprocess.Popen[bytes] | None = None
        if sys.platform != "linux":
            return
        mark = uuid.uuid4().hex
        # Else Ray's agents write the titles that they give themselves over their environment.
        self.environment = {VARIABLE: mark, "SPT_NOENV": "1"}
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", __file__, str(os.getpid()), mark],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # out of reach of signals to this process's group
        )

    def dismiss(self) -> None:
        """End it: the other processes have ended in order."""
        if self._reaper is not None:
            self._reaper.kill()
            self._reaper.wait()


def main(driver: int, mark: str) -> None:
    """Wait for the end of the driver, which started this process, then end the others."""
    while os.getppid() == driver:
        time.sleep(POLL_SECONDS)
    end = time.monotonic() + REAP_SECONDS
    while kill_marked(mark) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)


def kill_marked(mark: str) -> bool:
    """Kill every process that has the mark in its environment; whether there was one."""
    found = False
    wanted = f"{VARIABLE}={mark}".encode()
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is somebody else's
            if wanted in file.read_bytes().split(b"\0"):
                os.kill(int(file.parent.name), signal.SIGKILL)
                found = True
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
