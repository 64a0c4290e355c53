"""Ends what came from a process right after it: some of Ray's processes would stay for a minute.

Run as a program of its own, which outlives the process: ``leftovers.py PARENT PROCESS...``. Only
the standard library is used.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

POLL_SECONDS = 0.05


def end_with_this_process() -> None:
    """Have every process that came from this one end as soon as this one has (Linux only)."""
    here = os.getpid()
    family = list(_descendants(here))
    if family:
        subprocess.Popen(
            [sys.executable, __file__, str(here), *family],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def main(parent: int, family: Sequence[str]) -> None:
    """Wait for the parent's end, then end the others.

    Args:
        parent: id of the process that started this one.
        family: processes as ``id:start``; an id alone may be another process's by then.
    """
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    alive = {f"{pid}:{start}" for pid, _, start in _processes()}
    _kill(set(family) & alive)


def end_family() -> None:
    """End every process that came from this one."""
    _kill(_descendants(os.getpid()))


def _kill(processes: Iterable[str]) -> None:
    for process in list(processes):
        with contextlib.suppress(OSError):
            os.kill(int(process.partition(":")[0]), signal.SIGKILL)


def _descendants(pid: int) -> Iterator[str]:
    children: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for child, parent, start in _processes():
        children[parent].append((child, start))
    found = list(children[pid])
    for child, start in found:
        yield f"{child}:{start}"
        found += children[child]


def _processes() -> Iterator[tuple[int, int, str]]:
    """Id, parent's id and start time of every process."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()
            yield int(file.parent.name), int(fields[1]), fields[19]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
