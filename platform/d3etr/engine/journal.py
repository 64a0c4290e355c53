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
from typing import Any

from d3etr.files import atomic_write, clear_disk_errors
from d3etr.logs import get_logger
from d3etr.text import redacted

logger = get_logger(__name__)

Record = dict[str, Any]
NAMED_LINES = 5
"""So many damaged lines are named."""


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
            **fields: what the record says besides.

        Raises:
            UserError: no space left.
        """
        if not self._active:
            return
        # The clock may be set while a run goes on: durations are told by ``elapsed`` alone.
        elapsed = round(time.monotonic() - self._begun, 3)
        record = {"kind": kind, "step": step, "time": time.time(), "elapsed": elapsed, **fields}
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
        """Drop what comes after ``step``, a torn last line, and lines that are damaged.

        The new file replaces the old one, so a follower sees one or the other. Damaged lines
        before ``step`` are named in a message: what they said is lost, what others say is kept.

        Returns:
            Number of lines dropped.
        """
        if not (self._active and self.path.exists()):
            return 0
        lines = _lines(self.path)
        records = [_parse(line) for line in lines]
        kept = [
            line
            for line, record in zip(lines, records, strict=True)
            if record is not None and record["step"] <= step
        ]
        if len(kept) < len(lines):
            with (
                clear_disk_errors("the journal", self.path.parent),
                atomic_write(self.path) as temporary,
            ):
                temporary.write_bytes(b"".join(kept))
        if kept:
            lost = _damaged(lines[: lines.index(kept[-1])])
            if lost:
                self.message(step, f"the journal had damage: {named_lines(lost)} lost", "warning")
        return len(lines) - len(kept)


def read_journal(path: Path) -> list[Record]:
    """All whole records of a journal; none if there is no such file.

    Damaged lines are left out, and named in a warning.
    """
    if not path.exists():
        return []
    lines = _lines(path)
    _name_damage(path, tuple(_damaged(lines)))
    return [record for line in lines if (record := _parse(line)) is not None]


def named_lines(numbers: Sequence[int]) -> str:
    """``line 3 is``, ``lines 3, 5 and 7 more are``."""
    listed = ", ".join(map(str, numbers[:NAMED_LINES]))
    more = len(numbers) - NAMED_LINES
    if len(numbers) == 1:
        return f"line {listed} is"
    return f"lines {listed}{f' and {more} more' if more > 0 else ''} are"


def follow_journal(
    reader: JournalReader, finished: Callable[[], bool], poll_seconds: float = 0.5
) -> Iterator[Record]:
    """Yield records as they are written.

    Where a resumed run has cut the journal back, the iterator goes on behind what both
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
        _name_damage(self._path, tuple(damaged))


def _lines(path: Path) -> list[bytes]:
    with path.open("rb") as file:
        return file.readlines()


def _damaged(lines: Sequence[bytes]) -> list[int]:
    """Numbers of the lines that are whole and no records."""
    return [
        number
        for number, line in enumerate(lines, 1)
        if line.endswith(b"\n") and _parse(line) is None
    ]


@cache
def _name_damage(path: Path, numbers: tuple[int, ...]) -> None:
    """Once in a process, however often the file is read."""
    if numbers:
        text = "%s is damaged: %s left out, the rest is used"
        logger.warning(text, path, named_lines(numbers))


def _parse(line: bytes) -> Record | None:
    """The record of a whole line; None for a torn or foreign one."""
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if _is_record(found) else None


def _is_record(found: object) -> bool:
    """Whether every field that is read somewhere is of its type and there where it must be."""
    if not isinstance(found, dict) or found.get("kind") is None:
        return False
    needed = ("step", *_NEEDED.get(str(found["kind"]), ()))
    return all(name in found for name in needed) and all(
        fits(found[name]) for name, fits in _FIELDS.items() if name in found
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return True
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_time(value: object) -> bool:
    return _is_number(value) and 0 <= float(value) < 1e11  # type: ignore[arg-type]


def _is_metrics(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


_NEEDED = {
    "start": ("steps",),
    "evaluation": ("metrics",),
    "teacher": ("metrics",),
    "end": ("metrics",),
}
_FIELDS: dict[str, Callable[[object], bool]] = {
    "kind": _is_text,
    "step": _is_count,
    "time": _is_time,
    "elapsed": _is_time,
    "metrics": _is_metrics,
    "steps": _is_count,
    "steps_per_epoch": _is_count,
    "text": _is_text,
    "level": _is_text,
}


def _digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=8).digest()
