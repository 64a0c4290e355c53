"""How work that takes a while lets its caller know how far it is."""

from __future__ import annotations

from typing import Protocol


class OnProgress(Protocol):
    """Called with a line for a person, now and then where work is counted."""

    def __call__(self, text: str, done: int = 0, total: int = 0) -> None:
        """``text`` is being done: ``done`` of ``total`` items, where there is a total."""
        ...


def no_progress(text: str, done: int = 0, total: int = 0) -> None:
    """Shows nothing."""
