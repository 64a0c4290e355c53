"""Checkpoints written beside the training: it waits for a copy in memory, not for the disk."""

from __future__ import annotations

import copy
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from d3etr.engine.checkpoints import CheckpointStore, State


class BackgroundSaver:
    """Saves checkpoints in a thread, one at a time.

    What goes wrong there is raised by the next call of any method.

    Args:
        store: writes them.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: State, weights: Path | None = None) -> None:
        """Save a checkpoint of this moment, once the last one is written.

        Args:
            step: optimiser steps done.
            state: what a resume needs; it may change as soon as this returns.
            weights: a file to keep beside it; it may be replaced as soon as this returns.

        Raises:
            UserError: no space left, for this checkpoint or the last one.
        """
        self.wait()
        now = snapshot(state)
        held = None if weights is None else self._store.hold(step, weights)
        self._pending = self._executor.submit(self._write, step, now, held)

    def check(self) -> None:
        """Raise what the last save came to, if it has failed; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, state: State, held: Path | None) -> None:
        try:
            self._store.save(step, state, held)
        finally:
            if held is not None:
                shutil.rmtree(held.parent, ignore_errors=True)

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()


def snapshot(value: Any) -> Any:
    """A copy in main memory: tensors of dicts and lists are copied, whatever device holds them."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        found = copy.copy(value)  # a state dict has attributes
        for key in found:
            found[key] = snapshot(found[key])
        return found
    if isinstance(value, list | tuple):
        return type(value)(snapshot(part) for part in value)
    return value
