"""The journal of a run: one JSON object a line, the source of truth of its metrics.

Rank 0 appends; anybody may follow. On resume the journal is cut back to the checkpoint's
step, so that no step appears twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from d3etr.text import redacted
from d3etr.training.storage import clear_disk_errors, temporary_beside

Record = dict[str, Any]


class Journal:
    """Appends records; every record is on disk (flushed) when ``write`` returns.

    Args:
        path: the journal file; made on the first record.
        active: False makes every method do nothing: workers but the first keep no journal.
    """

    def __init__(self, path: Path, *, active: bool = True) -> None:
        self.path, self._active = path, active

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Append a record.

        Args:
            kind: ``start``, ``step``, ``evaluation``, ``teacher``, ``message`` or ``end``.
            step: optimiser steps done.
            **fields: what the record says besides.

        Raises:
            UserError: no space left.
        """
        if not self._active:
            return
        record = {"kind": kind, "step": step, "time": time.time(), **fields}
        line = json.dumps(record, allow_nan=False) + "\n"
        with (
            clear_disk_errors("the journal", self.path.parent),
            self.path.open("a", encoding="utf-8") as file,
        ):
            file.write(line)

    def message(self, step: int, text: str, level: str = "info") -> None:
        """Append a line for people; ``level`` is ``info`` or ``warning``."""
        self.write("message", step, text=redacted(text), level=level)

    def cut_back(self, step: int) -> int:
        """Drop everything from the first record after ``step`` on, and a torn last line.

        The new file replaces the old one, so a follower sees one or the other.

        Returns:
            Number of lines dropped.
        """
        if not (self._active and self.path.exists()):
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = lines[: _leading(lines, step)]
        if len(kept) < len(lines):
            temporary = temporary_beside(self.path)
            with clear_disk_errors("the journal", self.path.parent):
                temporary.write_bytes(b"".join(kept))
                os.replace(temporary, self.path)
        return len(lines) - len(kept)


def read_journal(path: Path) -> list[Record]:
    """All whole records of a journal; none if there is no such file."""
    if not path.exists():
        return []
    records = (_parse(line) for line in path.read_bytes().splitlines(keepends=True))
    return [record for record in records if record is not None]


def follow_journal(
    path: Path, finished: Callable[[], bool], poll_seconds: float = 0.5
) -> Iterator[Record]:
    """Yield records as they are written.

    Where a resumed run has cut the journal back, the iterator goes on behind what both
    versions share: what was dropped and is written anew is yielded again.

    Args:
        path: the journal; it need not exist yet.
        finished: asked when nothing new is there; once true, the rest is read and the
            iterator ends.
        poll_seconds: pause between looks.
    """
    reader = _Reader(path)
    while True:
        last = finished()  # asked before reading: what was written until then is still read
        yield from reader.new_records()
        if last:
            return
        time.sleep(poll_seconds)


class _Reader:
    """Remembers what it has yielded, by file identity, offset and a digest of each line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._seen: list[bytes] = []

    def new_records(self) -> Iterator[Record]:
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
        yield from self._take(lines)

    def _shared_prefix(self, lines: list[bytes]) -> int:
        """Bytes that this version of the file has in common with what was yielded."""
        same = 0
        for line, digest in zip(lines, self._seen, strict=False):
            if _digest(line) != digest:
                break
            same += 1
        del self._seen[same:]
        return sum(map(len, lines[:same]))

    def _take(self, lines: list[bytes]) -> Iterator[Record]:
        for line in lines:
            if not line.endswith(b"\n"):  # still being written
                return
            self._offset += len(line)
            self._seen.append(_digest(line))
            record = _parse(line)
            if record is not None:
                yield record


def _leading(lines: list[bytes], step: int) -> int:
    for index, line in enumerate(lines):
        record = _parse(line)
        if record is None or record.get("step", 0) > step:
            return index
    return len(lines)


def _parse(line: bytes) -> Record | None:
    """The record of a whole line; None for a torn or foreign one."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if _is_record(record) else None


def _is_record(record: Any) -> bool:
    """Whether a line has what every record has, of the types that ``Journal`` writes."""
    return (
        isinstance(record, dict)
        and isinstance(record.get("kind"), str)
        and type(record.get("step")) is int
        and 0 <= record["step"] < 2**63
        and type(record.get("time", 0.0)) in (int, float)
        and math.isfinite(record.get("time", 0.0))
        and isinstance(record.get("metrics", {}), dict)
    )


def _digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=8).digest()
