"""How the process of a command ends, whatever becomes of Ray.

Ray's native code may raise, hang or end the process while it disconnects, and so may a thread
that still waits inside of it while Python ends. So a command that did what it should never
disconnects: its results are written and its words said, then the process is over.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NoReturn

from d3etr.logs import get_logger

logger = get_logger(__name__)

END_SECONDS = 30.0
"""What is done at the end has so long."""


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
    ending = _Ending()
    _ending.set(ending)
    code = command()
    for stream in (sys.stdout, sys.stderr):
        attempt(stream.flush)
    for action in ending.last:
        attempt_within(END_SECONDS, action)
    if ending.last or ending.at_once:
        logging.shutdown()
        os._exit(code)
    sys.exit(code)


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


def attempt_within(seconds: float, action: Callable[[], object]) -> Exception | None:
    """Run ``action`` in a thread; what it raised, or ``NoAnswerError`` if it does not come back.

    A thread that is left behind may crash Python's end: a command then ends at once.
    """
    outcome: list[Exception | None] = []
    thread = threading.Thread(
        target=lambda: outcome.append(attempt(action)), name="may-hang", daemon=True
    )
    thread.start()
    thread.join(seconds)
    if outcome:
        return outcome[0]
    if (ending := _ending.get()) is not None:
        ending.at_once = True
    return NoAnswerError(f"no answer within {seconds:g} seconds")
