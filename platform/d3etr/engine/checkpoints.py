"""Checkpoints: written whole or not at all, verified when read.

A checkpoint is a folder ``step-00000750`` with ``state.pt``, the weights file that the run
would hand over at that moment, and ``manifest.json``, which holds the others' SHA-256 sums.
It is made under a temporary name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

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
        warn: told, in a sentence, about a damaged checkpoint.
    """

    def __init__(
        self, folder: Path, keep: int, warn: Callable[[str], None] = logger.warning
    ) -> None:
        self.folder, self._keep, self._warn = folder, keep, warn

    def save(self, step: int, state: State, weights: Path | None = None) -> Path:
        """Save a checkpoint, then remove the oldest beyond the number to keep.

        Args:
            step: optimiser steps done.
            state: what a resume needs.
            weights: a file to keep beside it (by hard link where possible).

        Raises:
            UserError: no space left; earlier checkpoints are untouched.
        """
        target = self.folder / f"{CHECKPOINT_PREFIX}{step:08d}"
        with (
            clear_disk_errors(f"the checkpoint of step {step}", self.folder),
            atomic_write(target) as temporary,
        ):
            temporary.mkdir(parents=True)
            _fill(temporary, step, state, weights)
            shutil.rmtree(target, ignore_errors=True)  # damaged, or it would not be redone
        self._prune()
        return target

    def hold(self, step: int, weights: Path) -> Path:
        """A second name of a file for a later ``save``, until when it may be replaced.

        It is alone in a folder, which whoever saved removes, or else ``remove_leftovers``.

        Raises:
            UserError: no space left.
        """
        folder = temporary_beside(self.folder / f"{CHECKPOINT_PREFIX}{step:08d}")
        with clear_disk_errors(f"the checkpoint of step {step}", self.folder):
            folder.mkdir(parents=True)
            link_or_copy(weights, folder / WEIGHTS_FILE)
        return folder / WEIGHTS_FILE

    def newest(self, examine: Callable[[Checkpoint], None] | None = None) -> Checkpoint | None:
        """The newest intact checkpoint; damaged ones are named in a warning and passed over.

        Args:
            examine: raises ``DamagedFileError`` for what cannot be used though its sums are right.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        folders = self._folders()
        for folder in reversed(folders):
            found, problem = Checkpoint(_step_of(folder), folder), damage(folder)
            try:
                if problem is None and examine is not None:
                    examine(found)
            except DamagedFileError as error:
                problem = str(error)
            if problem is None:
                return found
            self._warn(f"checkpoint {folder} is damaged ({problem}): using the one before it")
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
        folder = self.folder / f"{CHECKPOINT_PREFIX}{step:08d}"
        if not (folder / STATE_FILE).exists():
            raise UserError(
                f"{folder} was found by the first worker, but this one does not see it: "
                "run.output must be on storage that all nodes share"
            )
        return Checkpoint(step, folder)

    def remove_leftovers(self) -> None:
        """Remove what a killed run left half-written."""
        if self.folder.exists():
            for folder in self.folder.glob(f".{CHECKPOINT_PREFIX}*.tmp"):
                shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        if not self.folder.exists():
            return []
        return sorted(f for f in self.folder.glob(f"{CHECKPOINT_PREFIX}*") if f.name[5:].isdigit())

    def _prune(self) -> None:
        for folder in self._folders()[: -self._keep]:
            shutil.rmtree(folder, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is intact."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if STATE_FILE not in manifest["sha256"]:
            return f"{MANIFEST} has no checksum of {STATE_FILE}"
        for name, expected in manifest["sha256"].items():
            if sha256(folder / name) != expected:
                return f"{name} does not have the checksum that {MANIFEST} says"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {error!r}"
    return None


def _fill(folder: Path, step: int, state: State, weights: Path | None) -> None:
    sums = {STATE_FILE: _write_state(folder / STATE_FILE, state)}
    if weights is not None:
        link_or_copy(weights, folder / WEIGHTS_FILE)
        sums[WEIGHTS_FILE] = sha256(folder / WEIGHTS_FILE)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"step": step, "sha256": sums}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _write_state(path: Path, state: State) -> str:
    """Write ``state`` and return the SHA-256 of the file, computed on the way."""
    with path.open("wb") as file:
        stream = _HashingStream(file)
        try:
            torch.save(state, cast(IO[bytes], stream))  # it needs write and flush only
        except RuntimeError:
            # torch's writer hides what the file system said behind an error of its own
            if stream.error is not None:
                raise stream.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return stream.digest.hexdigest()


class _HashingStream:
    """A file to write to that hashes what passes and remembers the first error."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(CHECKPOINT_PREFIX))
