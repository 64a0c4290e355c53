"""How the process of a command ends, whatever becomes of Ray.

Ray's native code may raise, hang or end the process while it disconnects, and so may a thread
that still waits inside of it while Python ends. So a command that did what it should never
disconnects: its results are written and its words said, then the process is over.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NoReturn

from d3etr.launch.leftovers import end_family
from d3etr.launch.signals import end_wanted, hold, note_signals
from d3etr.logs import get_logger

logger = get_logger(__name__)

END_SECONDS = 30.0
"""What is done at the end has so long."""
POLL_SECONDS = 0.2
INTERRUPTED = 130
"""The exit code of a command that a signal ended: 128 + SIGINT, as shells have it."""


@dataclass
class _Ending:
    """How the process of the running command will end.

    Attributes:
        at_once: Python must not end in order.
        last: done at the very end.
    """

    at_once: bool = False
    last: list[Callable[[], object]] = field(default_factory=list)


_ending: ContextVar[_Ending | None] = ContextVar("ending", default=None)
"""None where the process goes on after what runs, as in a notebook."""


class NoAnswerError(TimeoutError):
    """A thread was left behind."""


def program(command: Callable[[], int]) -> NoReturn:
    """Be a command: run it and end this process with its code.

    Args:
        command: returns the exit code.
    """
    note_signals(_end_at_once)
    ending = _Ending()
    _ending.set(ending)
    try:
        code = command()
        hold()
    except KeyboardInterrupt as stop:  # before the command could take it, or as it returned
        hold()
        code = say_interrupted(stop)
    for stream in (sys.stdout, sys.stderr):
        attempt(stream.flush)
    for action in ending.last:
        attempt_within(END_SECONDS, action)
    if end_wanted() and not (ending.last or ending.at_once):
        # Python ends itself by SIGINT, whatever the code, if one met it inside of exec().
        logging.disable(logging.INFO)  # PyTorch would log statistics where its import was cut off
        attempt_within(END_SECONDS, atexit._run_exitfuncs)
        ending.at_once = True
    if ending.last or ending.at_once:
        logging.shutdown()
        os._exit(code)
    sys.exit(code)


def say_interrupted(stop: BaseException | None = None) -> int:
    """Say that a signal ended the command.

    Args:
        stop: has more to say than that, perhaps.

    Returns:
        The exit code.
    """
    attempt(lambda: sys.stderr.write((str(stop or "") or "interrupted") + "\n"))
    return INTERRUPTED


def _end_at_once() -> NoReturn:
    """On a second wish to end: what was saved is whole, as after a power cut."""
    say_interrupted(KeyboardInterrupt("interrupted again: ended at once; what was saved is whole"))
    attempt(end_family)
    os._exit(INTERRUPTED)


def is_command() -> bool:
    """Whether this process ends with the command that it runs."""
    return _ending.get() is not None


def at_the_end(action: Callable[[], object]) -> bool:
    """Have the command's process do this last and then end at once.

    Args:
        action: what it raises is nobody's concern any more.

    Returns:
        False where the process goes on after the command: nothing will be done.
    """
    ending = _ending.get()
    if ending is not None:
        ending.last.append(action)
    return ending is not None


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
    """Run ``action`` in a thread; what it raised, or ``NoAnswerError`` if it does not come back.

    A thread that is left behind may crash Python's end: a command then ends at once.

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
    if (ending := _ending.get()) is not None:
        ending.at_once = True
    return NoAnswerError(f"no answer within {seconds:g} seconds")
