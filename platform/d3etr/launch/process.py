"""The process of a command or a run: how signals reach it, and how it ends whatever becomes of Ray.

A signal may come at any moment: while Ray starts, while modules are imported, while what was
begun is being closed. It is noted at once, and becomes a ``KeyboardInterrupt`` in the main thread
where that can be acted on.

Ray's native code may raise, hang or end the process while it disconnects, and so may a thread
that still waits inside of it while Python ends. So a command that started or joined Ray never
disconnects: its results are written and its output is flushed, then the process is over.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

NUMBERS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
ECHO_SECONDS = 5.0
"""Terminals, shells and schedulers send several signals for one request: so long, they are one."""
EXIT_SECONDS = 30.0
"""Time limit of Python's exit hooks after a signal."""
POLL_SECONDS = 0.2
WAITING = ("GOMP_SPINCOUNT", "20000")
"""OpenMP's threads spin while they wait for each other: beside other programs each holds the core
that the other one needs. This is long enough for a machine of one's own, and 15 times shorter than
the default. Read when PyTorch is imported."""
INTERRUPTED = 130
"""The exit code of a command that a signal ended: 128 + SIGINT, as shells have it."""


@dataclass
class _Process:
    """What this process is, and whether it is to end.

    Attributes:
        is_command: it ends with the command that it runs; else it outlives what runs.
        handles_signals: as this module says; else signals are left as they are.
        skips_shutdown: it must end without Python's own shutdown.
        noted: monotonic time of the first signal.
        raised: the first signal has become an exception.
        held: so many blocks must not be interrupted.
    """

    is_command: bool = False
    handles_signals: bool = False
    skips_shutdown: bool = False
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
        if not first and self.is_command:
            _exit_at_once()

    def handle_signals(self) -> None:
        """Handle signals from now on; what is ignored, as under ``nohup``, stays ignored."""
        self.handles_signals = True
        for number in NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.handle)


_process = _Process()


def run_command(command: Callable[[], int]) -> NoReturn:
    """Run a command and end this process with its exit code.

    Args:
        command: returns the exit code.
    """
    _process.is_command = True
    _process.handle_signals()
    try:
        code = command()
        _process.held += 1  # no signal interrupts the process any more: it ends
    except KeyboardInterrupt as stop:  # before the command could take it, or as it returned
        _process.held += 1
        code = report_interrupt(stop)
    for stream in (sys.stdout, sys.stderr):
        attempt(stream.flush)
    if stop_requested() and not _process.skips_shutdown:
        # Python ends itself by SIGINT, whatever the code, if one met it inside of exec().
        logging.disable(logging.INFO)  # PyTorch would log statistics where its import was cut off
        attempt_within(EXIT_SECONDS, atexit._run_exitfuncs)
        _process.skips_shutdown = True
    if _process.skips_shutdown:
        logging.shutdown()
        attempt(_kill_children)
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
    attempt(_kill_children)
    os._exit(INTERRUPTED)


def _kill_children() -> None:
    """Kill what Ray started here: by itself, some of it would stay a minute.

    Everything is written: what Ray's threads print about the killed ones is nobody's to read.
    """
    import psutil  # type: ignore[import-untyped]  # Ray brings it

    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    for _ in range(2):  # what is being started as its parent is killed
        for child in psutil.Process().children(recursive=True):
            attempt(child.kill)


@contextmanager
def terminable() -> Iterator[None]:
    """Make signals end the block like Ctrl-C does, unless they do already."""
    global _process
    if _process.handles_signals or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in NUMBERS}
    _process.handle_signals()
    try:
        yield
    finally:
        _process = _Process()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Keep signals from interrupting the block; its end acts on one that was noted meanwhile.

    Raises:
        KeyboardInterrupt: at the end of the block.
    """
    here = _process
    if not here.handles_signals or threading.current_thread() is not threading.main_thread():
        yield
        return
    here.held += 1
    try:
        yield
    finally:
        here.held -= 1
        if here.noted is not None and not here.raised and not here.held:
            here.raised = True
            raise KeyboardInterrupt


def stop_requested() -> bool:
    """Whether a signal was noted: what fails from then on may fail for that reason."""
    return _process.noted is not None


def interrupt() -> None:
    """Interrupt the main thread, from another one."""
    # Ctrl-C may be ignored, as by what a script starts in the background.
    os.kill(os.getpid(), signal.SIGTERM if _process.handles_signals else signal.SIGINT)


def is_command() -> bool:
    """Whether this process ends with the command that it runs."""
    return _process.is_command


def skip_shutdown() -> bool:
    """Have a command's process end without Python's shutdown.

    Returns:
        False where the process outlives what runs: nothing changes.
    """
    _process.skips_shutdown = _process.is_command
    return _process.is_command


class NoAnswerError(TimeoutError):
    """A thread did not return in time and was left behind."""


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
    unless: Callable[[], bool] = lambda: False,
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
    while not done.wait(min(POLL_SECONDS, seconds)) and time.monotonic() < end and not unless():
        pass
    if outcome:
        return outcome[0]
    skip_shutdown()
    return NoAnswerError(f"no answer within {seconds:g} seconds")
