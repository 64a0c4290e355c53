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
"""Terminals, shells and schedulers send several signals for one request: so long, they are one."""


@dataclass
class _StopRequest:
    """Whether, and since when, this process is to end.

    Attributes:
        end_at_once: called on a second request while the first is acted on; must not return.
        noted: monotonic time of the first signal.
        raised: the first signal has become an exception.
        held: so many blocks must not be interrupted.
    """

    end_at_once: Callable[[], object] | None = None
    noted: float | None = None
    raised: bool = False
    held: int = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        first, now = self.noted is None, time.monotonic()
        if self.noted is None:
            self.noted = now
        if not first and now - self.noted < ECHO_SECONDS:
            return
        if not self.held:
            self.raised = True
            raise KeyboardInterrupt
        if not first and self.end_at_once is not None:
            self.end_at_once()


_request: _StopRequest | None = None
"""None where the process leaves signals as they are."""


def handle_signals(end_at_once: Callable[[], object] | None = None) -> None:
    """Handle Ctrl-C, termination and a closed terminal from now on (in the main thread).

    What is ignored, as under ``nohup``, stays ignored.

    Args:
        end_at_once: see ``_StopRequest``.
    """
    global _request
    _request = _StopRequest(end_at_once)
    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _request.handle)


@contextmanager
def terminable() -> Iterator[None]:
    """Make signals end the block like Ctrl-C does, unless they do already."""
    global _request
    if _request is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in NUMBERS}
    handle_signals()
    try:
        yield
    finally:
        _request = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Keep signals from interrupting the block; its end acts on one that was noted meanwhile.

    Raises:
        KeyboardInterrupt: at the end of the block.
    """
    request = _request
    if request is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    request.held += 1
    try:
        yield
    finally:
        request.held -= 1
        if request.noted is not None and not request.raised and not request.held:
            request.raised = True
            raise KeyboardInterrupt


def hold() -> None:
    """Let no signal interrupt this process any more: it ends."""
    if _request is not None:
        _request.held += 1


def stop_requested() -> bool:
    """Whether a signal was noted: what fails from then on may fail for that reason."""
    return _request is not None and _request.noted is not None


def interrupt() -> None:
    """Interrupt the main thread, from another one."""
    # Ctrl-C may be ignored, as by what a script starts in the background.
    os.kill(os.getpid(), signal.SIGINT if _request is None else signal.SIGTERM)
