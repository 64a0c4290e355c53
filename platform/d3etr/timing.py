"""Time per phase of a step, without ever waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seconds_on(device: torch.device) -> float:
    """Of the clock that is like that of steps: CPU time, with a GPU wall time."""
    return time.perf_counter() if device.type == "cuda" else time.process_time()


class PhaseTimer:
    """Adds up the seconds spent in named phases.

    On a GPU, work is timed by events in its own stream, which are read only in ``take``, when
    the device has been waited for anyway.

    Args:
        device: where the timed work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.device_seconds: float | None = 0.0 if self._events else None
        """Sum of all phases that were timed on a GPU; None without one."""

    @contextmanager
    def phase(self, name: str, *, host: bool = False) -> Iterator[None]:
        """Time a block.

        Args:
            name: the phase it counts for.
            host: the block is work of the CPU (as loading data is), also on a GPU.
        """
        if self._events and not host:
            start, end = _event(), _event()
            start.record()
            yield
            end.record()
            self._pending.append((name, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begin

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere, as in another process."""
        if seconds:
            self._seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call; waits for the device's pending events."""
        for name, start, end in self._pending:
            end.synchronize()
            seconds = start.elapsed_time(end) / 1000
            self._seconds[name] += seconds
            self.device_seconds = (self.device_seconds or 0.0) + seconds
        self._pending.clear()
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
