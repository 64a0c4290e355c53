"""How work that takes a while lets its caller know how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class OnProgress(Protocol):
    """Called with a line for a person, now and then where work is counted."""

    def __call__(self, text: str, done: int = 0, total: int = 0, /) -> None:
        """``text`` is being done: ``done`` of ``total`` items, where there is a total."""
        ...


def no_progress(text: str, done: int = 0, total: int = 0, /) -> None:
    """Shows nothing."""


def counted(text: str, done: int, total: int) -> str:
    """``text: 3 of 1,000``, or the text alone where there is no total."""
    return f"{text}: {done:,} of {total:,}" if total else text


def stamped(line: str) -> str:
    """``line`` with the time of day before it, for logs."""
    return f"{time.strftime('%H:%M:%S')} {line}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class PacedProgress:
    """An ``OnProgress`` that writes a line now and then, with the time that is left.

    Args:
        write: takes the lines.
        first: seconds until the first line: sooner work is not worth one.
        every: seconds between lines.
    """

    def __init__(self, write: Callable[[str], None], first: float, every: float) -> None:
        self._write, self._every = write, every
        self._next = time.monotonic() + first
        self._begun: dict[str, tuple[float, int]] = {}

    def __call__(self, text: str, done: int = 0, total: int = 0, /) -> None:
        """``done`` of ``total`` items of ``text`` are finished."""
        now = time.monotonic()
        begun, before = self._begun.setdefault(text, (now, done))
        if now < self._next:
            return
        self._next = now + self._every
        left = ""
        if before < done < total:
            left = f", {duration((now - begun) / (done - before) * (total - done))} left"
        self._write(counted(text, done, total) + left)
