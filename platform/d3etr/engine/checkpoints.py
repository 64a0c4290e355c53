"""Checkpoints: written whole or not at all, verified when read, by a thread.

A checkpoint is a folder ``step-00000750`` with ``state.pt``, the weights file that the run
would hand over at that moment, and ``manifest.json``, which holds the others' SHA-256 sums.
It is made under a temporary name and renamed.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3etr.engine.run_folder import CHECKPOINT_PREFIX, WEIGHTS_FILE
from d3etr.errors import UserError
from d3etr.files import (
    DamagedFileError,
    atomic_write,
    clear_disk_errors,
    link_or_copy,
    sha256,
    temporary_beside,
)
from d3etr.logs import get_logger

logger = get_logger(__name__)

State = dict[str, Any]
"""Tensors, numbers, words, and dicts and lists of them: what ``weights_only`` loads."""

STATE_FILE, MANIFEST = "state.pt", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found intact."""

    step: int
    folder: Path

    def state(self) -> State:
        """What was saved, on the CPU; nothing but plain data is unpickled.

        Raises:
            DamagedFileError: the file cannot be read as one.
        """
        path = self.folder / STATE_FILE
        try:
            state: State = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and torch all raise their own
            raise DamagedFileError(f"{path} cannot be read: {error}") from error
        return state

    @property
    def weights(self) -> Path | None:
        """The weights file that the run would have handed over, if there was one."""
        path = self.folder / WEIGHTS_FILE
        return path if path.exists() else None


class CheckpointStore:
    """The checkpoints of one run. Only rank 0 saves; every rank may open.

    Args:
        folder: holds the checkpoints; made on the first save.
        keep: number of newest checkpoints that stay.
        warn: takes a sentence about a damaged checkpoint.
    """

    def __init__(
        self, folder: Path, keep: int, warn: Callable[[str], None] = logger.warning
    ) -> None:
        self.folder, self._keep, self._warn = folder, keep, warn

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of ``step``."""
        return self.folder / f"{CHECKPOINT_PREFIX}{step:08d}"

    def save(self, step: int, state: State, weights: Path | None = None) -> Path:
        """Save a checkpoint, then remove the oldest beyond the number to keep.

        Args:
            step: optimiser steps done.
            state: what a resume needs.
            weights: a file to keep with it (by hard link where possible).

        Raises:
            UserError: no space left; earlier checkpoints are untouched.
        """
        target = self.path(step)
        with (
            clear_disk_errors(f"the checkpoint of step {step}", self.folder),
            atomic_write(target) as temporary,
        ):
            temporary.mkdir(parents=True)
            # In memory first: torch hides the file system's errors behind its own.
            buffer = io.BytesIO()
            torch.save(state, buffer)
            sums = {STATE_FILE: hashlib.sha256(buffer.getbuffer()).hexdigest()}
            _write(temporary / STATE_FILE, buffer.getbuffer())
            if weights is not None:
                link_or_copy(weights, temporary / WEIGHTS_FILE)
                sums[WEIGHTS_FILE] = sha256(temporary / WEIGHTS_FILE)
            manifest = json.dumps({"step": step, "sha256": sums}, indent=1)
            _write(temporary / MANIFEST, manifest.encode())
            shutil.rmtree(target, ignore_errors=True)  # damaged, or it would not be redone
        for folder in self._folders()[: -self._keep]:
            shutil.rmtree(folder, ignore_errors=True)
        return target

    def newest(self, use: Callable[[Checkpoint], None] | None = None) -> Checkpoint | None:
        """The newest intact checkpoint; damaged ones are named in a warning and passed over.

        Args:
            use: raises ``DamagedFileError`` for what cannot be used though its sums are right.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        folders = self._folders()
        for folder in reversed(folders):
            found = Checkpoint(int(folder.name.removeprefix(CHECKPOINT_PREFIX)), folder)
            try:
                _verify(folder)
                if use is not None:
                    use(found)
                return found
            except DamagedFileError as error:
                self._warn(f"checkpoint {folder} is damaged ({error}): using the one before it")
        if folders:
            raise UserError(
                f"all checkpoints in {self.folder} are damaged: nothing is left to resume "
                "from. Remove the run's folder, or give the run another name, to start anew."
            )
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``, which another worker has verified.

        Raises:
            UserError: it cannot be seen from here.
        """
        if not (self.path(step) / STATE_FILE).exists():
            raise UserError(
                f"{self.path(step)} was found by the first worker, but this one does not see it: "
                "run.output must be on storage that all nodes share"
            )
        return Checkpoint(step, self.path(step))

    def remove_leftovers(self) -> None:
        """Remove what a killed run left half-written."""
        for left in self.folder.glob(f".{CHECKPOINT_PREFIX}*.tmp"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def _folders(self) -> list[Path]:
        names = self.folder.glob(f"{CHECKPOINT_PREFIX}*")
        return sorted(f for f in names if f.name.removeprefix(CHECKPOINT_PREFIX).isdigit())


def _write(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _verify(folder: Path) -> None:
    """Raise ``DamagedFileError`` where a file differs from the manifest."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        wrong = [name for name, expected in sums.items() if sha256(folder / name) != expected]
    except FileNotFoundError as error:
        raise DamagedFileError(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{MANIFEST} cannot be read: {error!r}") from error
    if STATE_FILE not in sums:
        raise DamagedFileError(f"{MANIFEST} has no checksum of {STATE_FILE}")
    if wrong:
        raise DamagedFileError(f"{wrong[0]} does not have the checksum in {MANIFEST}")


class BackgroundSaver:
    """Saves checkpoints in a thread, one at a time: training waits for a copy in memory only.

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
            weights: a file to keep with it; it may be replaced as soon as this returns.

        Raises:
            UserError: no space left, for this checkpoint or the last one.
        """
        self.wait()
        now, held = snapshot(state), None
        if weights is not None:  # a second name, until when the first may be replaced
            held = temporary_beside(self._store.path(step))
            with clear_disk_errors(f"the checkpoint of step {step}", held.parent):
                held.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(weights, held)
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

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def _write(self, step: int, state: State, held: Path | None) -> None:
        try:
            self._store.save(step, state, held)
        finally:
            if held is not None:
                held.unlink(missing_ok=True)


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
