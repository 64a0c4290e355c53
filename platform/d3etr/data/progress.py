"""How long work tells its caller where it is."""

from typing import Protocol


class Progress(Protocol):
    """Called now and then by work that may take longer than two seconds."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` items of ``what`` are finished."""
        ...
