"""How the process of a command ends, whatever becomes of Ray.

Ray's native code may raise, hang or end the process while it disconnects, and so may a thread
that still waits inside of it while Python ends. So a command that started or joined Ray never
disconnects: its results are written and its output is flushed, then the process is over.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from d3etr.launch.signals import handle_signals, hold, stop_requested

EXIT_SECONDS = 30.0
"""Time limit of Python's exit hooks after a signal."""
POLL_SECONDS = 0.2
INTERRUPTED = 130
"""The exit code of a command that a signal ended: 128 + SIGINT, as shells have it."""


@dataclass
class _Command:
    """The command that this process runs.

    Attributes:
        skips_shutdown: the process must end without Python's own shutdown.
    """

    skips_shutdown: bool = False


_command: _Command | None = None
"""None where the process outlives what runs, as in a notebook."""


class NoAnswerError(TimeoutError):
    """A thread did not return in time and was left behind."""


def run_command(command: Callable[[], int]) -> NoReturn:
    """Run a command and end this process with its exit code.

    Args:
        command: returns the exit code.
    """
    global _command
    handle_signals(_exit_at_once)
    _command = _Command()
    try:
        code = command()
        hold()
    except KeyboardInterrupt as stop:  # before the command could take it, or as it returned
        hold()
        code = report_interrupt(stop)
    for stream in (sys.stdout, sys.stderr):
        attempt(stream.flush)
    if stop_requested() and not _command.skips_shutdown:
        # Python ends itself by SIGINT, whatever the code, if one met it inside of exec().
        logging.disable(logging.INFO)  # PyTorch would log statistics where its import was cut off
        attempt_within(EXIT_SECONDS, atexit._run_exitfuncs)
        _command.skips_shutdown = True
    if _command.skips_shutdown:
        logging.shutdown()
        os._exit(code)
    sys.exit(code)


def report_interrupt(stop: BaseException | None = None) -> int:
    """Write that a signal ended the command.

    Args:
        stop: its text, if it has one, is more exact.

    Returns:
        The exit code.
    """
    attempt(lambda: sys.stderr.write((str(stop or "") or "interrupted") + "\n"))
    return INTERRUPTED


def _exit_at_once() -> NoReturn:
    """On a second signal: what was saved is whole, as after a power cut."""
    report_interrupt(KeyboardInterrupt("interrupted again: ended at once; what was saved is whole"))
    for child in multiprocessing.active_children():
        attempt(child.kill)
    os._exit(INTERRUPTED)


def is_command() -> bool:
    """Whether this process ends with the command that it runs."""
    return _command is not None


def skip_shutdown() -> bool:
    """Have a command's process end without Python's shutdown.

    Returns:
        False where the process outlives what runs: nothing changes.
    """
    if _command is not None:
        _command.skips_shutdown = True
    return is_command()


def attempt(action: Callable[[], object]) -> Exception | None:
    """What ``action`` raised, if anything."""
    try:
        action()
    except Exception as error:
        return error
    return None


def attempt_within(
    seconds: float,
    action: Callable[[], object],
    stay: threading.Event | None = None,
    unless: Callable[[], bool] | None = None,
) -> Exception | None:
    """Run ``action`` in a thread; what it raised, or ``NoAnswerError`` if it does not return.

    A thread that is left behind may crash Python's shutdown: a command then skips it.

    Args:
        seconds: how long to wait.
        action: what to run.
        stay: the thread lives until this is set: the processes that Ray starts end with the
            thread that started them.
        unless: ends the wait early.
    """
    outcome: list[Exception | None] = []
    done = threading.Event()

    def run() -> None:
        try:
            outcome.append(attempt(action))
        finally:
            done.set()
        if stay is not None:
            stay.wait()

    threading.Thread(target=run, name="may-hang", daemon=True).start()
    end = time.monotonic() + seconds
    while not done.wait(min(POLL_SECONDS, seconds)) and time.monotonic() < end:
        if unless is not None and unless():
            break
    if outcome:
        return outcome[0]
    skip_shutdown()
    return NoAnswerError(f"no answer within {seconds:g} seconds")
