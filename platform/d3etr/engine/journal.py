"""The journal of a run: one JSON object a line, the source of truth of its metrics.

Rank 0 appends; anybody may follow. On resume the journal is cut back to the checkpoint's
step, so that no step appears twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from d3etr.files import atomic_write, clear_disk_errors
from d3etr.logs import get_logger
from d3etr.text import redacted

logger = get_logger(__name__)

KEPT_MAP = "val/kept_mAP"
"""Metric of an evaluation: mAP of the weights in the run's folder, which may be earlier ones."""
Record = dict[str, Any]
_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Seconds = Annotated[float, Field(ge=0, lt=1e11)]


class _Fields(BaseModel):
    """Types of the fields that are read somewhere."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    kind: str
    step: _Count
    time: _Seconds = 0
    elapsed: _Seconds = 0
    metrics: dict[str, float] = {}
    steps: _Count = 0
    steps_per_epoch: _Count = 0
    text: str = ""
    level: str = ""


_NEEDED = {"start": "steps", "evaluation": "metrics", "teacher": "metrics", "end": "metrics"}
"""A field that every record of a kind has."""


class Journal:
    """Appends records; every record is on disk (flushed) when ``write`` returns.

    Args:
        path: the journal file; made on the first record.
        active: False makes every method do nothing: workers but the first keep no journal.
    """

    def __init__(self, path: Path, *, active: bool = True) -> None:
        self.path, self._active, self._begun = path, active, time.monotonic()

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Append a record.

        Args:
            kind: ``start``, ``step``, ``evaluation``, ``teacher``, ``message`` or ``end``.
            step: optimiser steps done.
            **fields: the rest of the record.

        Raises:
            UserError: no space left.
        """
        if not self._active:
            return
        # The clock may be set during a run: durations come from ``elapsed`` alone.
        elapsed = round(time.monotonic() - self._begun, 3)
        record = {"kind": kind, "step": step, "time": time.time(), "elapsed": elapsed, **fields}
        line = json.dumps(record, allow_nan=False) + "\n"
        with (
            clear_disk_errors("the journal", self.path.parent),
            self.path.open("a", encoding="utf-8") as file,
        ):
            file.write(line)

    def message(self, step: int, text: str, level: str = "info", **fields: str) -> None:
        """Append a line for people; ``level`` is ``info`` or ``warning``, ``fields`` join it."""
        self.write("message", step, text=redacted(text), level=level, **fields)

    def cut_back(self, step: int) -> int:
        """Drop what comes after ``step``, a torn last line, and lines that are damaged.

        The new file replaces the old one, so a follower sees one or the other. Damaged lines
        before ``step`` are named in a message.

        Returns:
            Number of lines dropped.
        """
        if not (self._active and self.path.exists()):
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        steps = [None if (record := _parse(line)) is None else record["step"] for line in lines]
        kept = [index for index, at in enumerate(steps) if at is not None and at <= step]
        if len(kept) < len(lines):
            with (
                clear_disk_errors("the journal", self.path.parent),
                atomic_write(self.path) as temporary,
            ):
                temporary.write_bytes(b"".join(lines[index] for index in kept))
        lost = [index + 1 for index in range(max(kept, default=0)) if steps[index] is None]
        if lost:
            self.message(step, f"the journal had damage: {_lines(lost)} lost", "warning")
        return len(lines) - len(kept)


def read_journal(path: Path) -> list[Record]:
    """All whole records of a journal; none if there is no such file.

    Damaged lines are left out, and named in a warning.
    """
    return list(JournalReader(path).new_records())


def follow_journal(
    reader: JournalReader, finished: Callable[[], bool], poll_seconds: float = 0.5
) -> Iterator[Record]:
    """Yield records as they are written.

    Where a resumed run has cut the journal back, the iterator continues behind what both
    versions share: what was dropped and is written anew is yielded again.

    Args:
        reader: of the journal, which need not exist yet.
        finished: asked when nothing new is there; once true, the rest is read and the
            iterator ends.
        poll_seconds: pause between looks.
    """
    while True:
        last = finished()  # asked before reading: what was written until then is still read
        yield from reader.new_records()
        if last:
            return
        time.sleep(poll_seconds)


class JournalReader:
    """Remembers what it has yielded, by file identity, offset and a digest of each line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._seen: list[bytes] = []

    def new_records(self) -> Iterator[Record]:
        """What was written since the last call; damaged lines are named in a warning."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            status = os.fstat(file.fileno())
            if (status.st_dev, status.st_ino) != self._identity or status.st_size < self._offset:
                self._identity = (status.st_dev, status.st_ino)
                self._offset = self._shared_prefix(file.readlines())
            file.seek(self._offset)
            lines = file.readlines()
        damaged = []
        for line in lines:
            if not line.endswith(b"\n"):  # still being written
                break
            self._offset += len(line)
            self._seen.append(_digest(line))
            record = _parse(line)
            if record is not None:
                yield record
            else:
                damaged.append(len(self._seen))
        _warn_of_damage(self._path, tuple(damaged))

    def _shared_prefix(self, lines: list[bytes]) -> int:
        """Bytes that this version of the file has in common with what was yielded."""
        same = 0
        for line, digest in zip(lines, self._seen, strict=False):
            if _digest(line) != digest:
                break
            same += 1
        del self._seen[same:]
        return sum(map(len, lines[:same]))


def _lines(numbers: Sequence[int]) -> str:
    """``line 3 is``, ``7 lines from line 3 on are``."""
    if len(numbers) == 1:
        return f"line {numbers[0]} is"
    return f"{len(numbers)} lines from line {numbers[0]} on are"


@cache
def _warn_of_damage(path: Path, numbers: tuple[int, ...]) -> None:
    """Once in a process, however often the file is read."""
    if numbers:
        logger.warning("%s is damaged: %s left out, the rest is used", path, _lines(numbers))


def _parse(line: bytes) -> Record | None:
    """The record of a whole line; None for a torn or foreign one."""
    try:
        found = json.loads(line if line.endswith(b"\n") else b"")
        fields = _Fields.model_validate(found)
    except (ValueError, RecursionError, ValidationError):
        return None
    needed = _NEEDED.get(fields.kind, "step")
    return found if needed in fields.model_fields_set else None


def _digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=8).digest()
