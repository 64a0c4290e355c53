"""Processes and what came from them, told apart from all others of this machine."""

import contextlib
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

Process = tuple[int, str]
"""Id and start time: an id alone may be another process's by now."""
STOP_SECONDS = 10.0
KILLED_SECONDS = 10.0
"""A killed process may take a moment to give its memory back."""


def running() -> set[Process]:
    """Every process of this machine."""
    return {(pid, start) for pid, _, start in _statistics()}


def descendants(pid: int) -> set[Process]:
    """A process and all that came from it."""
    children: dict[int, list[Process]] = defaultdict(list)
    found: list[Process] = []
    for child, parent, start in _statistics():
        children[parent].append((child, start))
        found += [(child, start)] * (child == pid)
    for child, _ in found:
        found += children[child]
    return set(found)


def end(process: subprocess.Popen[bytes]) -> set[Process]:
    """Ask a process and its session to end, then make all that came from it end.

    Returns:
        All of them.
    """
    family = descendants(process.pid)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    return _kill(process, family)


def kill(process: subprocess.Popen[bytes]) -> set[Process]:
    """Make a process and all that came from it end at once, as a power cut would.

    Returns:
        All of them.
    """
    return _kill(process, descendants(process.pid))


def _kill(process: subprocess.Popen[bytes], family: set[Process]) -> set[Process]:
    for pid, _ in family & running():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + KILLED_SECONDS
    while family & running() and time.monotonic() < deadline:
        time.sleep(0.1)
    return family


def _statistics() -> Iterator[tuple[int, int, str]]:
    """Id, parent's id and start time of every process that is no zombie."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                yield int(file.parent.name), int(fields[1]), fields[19]
