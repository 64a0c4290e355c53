"""End a run or a command in order when the system, or a person, asks for it.

A signal may come at any moment: while Ray starts, while modules are imported, while what was
begun is being closed. It is noted at once, and becomes a ``KeyboardInterrupt`` in the main thread
where that can be acted on.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

NUMBERS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
ECHO_SECONDS = 5.0
"""Terminals, shells and schedulers send several signals for one wish: so long, they are one."""


@dataclass
class _Wish:
    """Whether somebody wants this process to end.

    Attributes:
        impatient: ends the process at once, on a second wish while the first is acted on.
        noted: monotonic time of the first signal.
        raised: the first signal has become an exception.
        held: so many blocks want none.
    """

    impatient: Callable[[], object] | None = None
    noted: float | None = None
    raised: bool = False
    held: int = 0

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        first, now = self.noted is None, time.monotonic()
        if self.noted is None:
            self.noted = now
        if not first and now - self.noted < ECHO_SECONDS:
            return
        if not self.held:
            self.raised = True
            raise KeyboardInterrupt
        if not first and self.impatient is not None:
            self.impatient()


_wish: _Wish | None = None
"""None where the process leaves signals as they are."""


def handle_signals(impatient: Callable[[], object] | None = None) -> None:
    """Handle Ctrl-C, termination and a closed terminal from now on (in the main thread).

    What is ignored, as under ``nohup``, stays ignored.

    Args:
        impatient: see ``_Wish``; must not return.
    """
    global _wish
    _wish = _Wish(impatient)
    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _wish.take)


@contextmanager
def terminable() -> Iterator[None]:
    """Make signals end the block like Ctrl-C does, unless they do already."""
    global _wish
    if _wish is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in NUMBERS}
    handle_signals()
    try:
        yield
    finally:
        _wish = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Keep signals from interrupting the block; its end acts on one that was noted meanwhile.

    Raises:
        KeyboardInterrupt: at the end of the block.
    """
    wish = _wish
    if wish is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    wish.held += 1
    try:
        yield
    finally:
        wish.held -= 1
        if wish.noted is not None and not wish.raised and not wish.held:
            wish.raised = True
            raise KeyboardInterrupt


def hold() -> None:
    """Let no signal interrupt this process any more: it ends."""
    if _wish is not None:
        _wish.held += 1


def end_wanted() -> bool:
    """Whether a signal was noted: what fails from then on may fail for that reason."""
    return _wish is not None and _wish.noted is not None


def interrupt() -> None:
    """Interrupt the main thread, from another one."""
    # Ctrl-C may be ignored, as by what a script starts in the background.
    os.kill(os.getpid(), signal.SIGINT if _wish is None else signal.SIGTERM)
