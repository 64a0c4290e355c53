"""What is known of the files below one URL: stamp, digest and seal of each that was fetched.

A line is added for every file that arrives, so a fetch that was interrupted goes on where it
was; a torn last line counts for nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3etr.config.location import Url
from d3etr.logs import get_logger
from d3etr.storage.cache import Cache, Seal, seal_of, sha256
from d3etr.storage.remote import Stamp

logger = get_logger(__name__)

_SPARE_LINES = 64


@dataclass(frozen=True)
class Known:
    """One fetched file.

    Attributes:
        stamp: what the storage said of it.
        digest: SHA-256 of its content, hex.
        seal: of its copy here, when its content was last checked.
    """

    stamp: Stamp
    digest: str
    seal: Seal


class Index:
    """What is known of a URL; to be used by one process at a time.

    Args:
        cache: where content is.
        url: of a file or folder.
    """

    def __init__(self, cache: Cache, url: Url) -> None:
        self.cache, self.url = cache, url
        self.file = cache.index(url)
        self.known: dict[str, Known] = {}
        """By name."""
        self._checked: dict[str, float] = {}
        self._lines = 0
        for record in read_records(self.file):
            self._lines += 1
            self._take(record)

    def checked_at(self, names: Iterable[str]) -> float:
        """When the storage was last asked about exactly these names, and had them all.

        Only to be compared for equality, since clocks are set; 0 for never.
        """
        return self._checked.get(_digest_of(names), 0.0)

    def add(self, name: str, known: Known) -> None:
        """Note a file that is complete."""
        self.known[name] = known
        self._append(
            {
                "name": name,
                "size": known.stamp.size,
                "mark": known.stamp.mark,
                "digest": known.digest,
                "seal": list(known.seal),
            }
        )

    def note_check(self, names: Iterable[str]) -> None:
        """Note that the storage has all of these as they are here."""
        which = _digest_of(names)
        self._checked[which] = time.time()
        self._append({"checked": self._checked[which], "names": which})
        if self._lines > 2 * (len(self.known) + len(self._checked)) + _SPARE_LINES:
            self._rewrite()

    def intact(self, name: str) -> bool:
        """Whether the copy of ``name`` is here and has the content that was fetched.

        The content is read where its seal is broken; damage is told in a warning.
        """
        known = self.known.get(name)
        if known is None:
            return False
        copy = self.cache.object(known.digest)
        try:
            seal = seal_of(copy)
            if seal == known.seal:
                return True
            damaged = sha256(copy) != known.digest
        except FileNotFoundError:
            return False
        if damaged:
            logger.warning(
                "the cached copy of %s%s is damaged (%s has other content than was fetched): "
                "fetching it again",
                self.url.shown,
                "" if name == self.url.name else f"/{name}",
                copy,
            )
            copy.unlink(missing_ok=True)
            return False
        self.add(name, Known(known.stamp, known.digest, seal))
        return True

    def _take(self, record: dict[str, Any]) -> None:
        if "name" in record:
            stamp = Stamp(record.get("size"), record["mark"])
            self.known[record["name"]] = Known(stamp, record["digest"], Seal(*record["seal"]))
        elif isinstance(record.get("checked"), int | float):
            self._checked[str(record.get("names"))] = float(record["checked"])

    def _append(self, record: dict[str, Any]) -> None:
        self._lines += 1
        with self.file.open("ab+") as file:
            if file.tell() == 0:
                file.write(_line({"url": self.url.shown}))
            else:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # torn by a process that died
                    file.write(b"\n")
            file.write(_line(record))

    def _rewrite(self) -> None:
        """Leave out what later lines replaced."""
        known, self.file = self.known, self.file.with_suffix(".tmp")
        self.file.unlink(missing_ok=True)
        self._lines = 0
        for name, one in known.items():
            self.add(name, one)
        for which, moment in self._checked.items():
            self._append({"checked": moment, "names": which})
        os.replace(self.file, self.cache.index(self.url))
        self.file = self.cache.index(self.url)


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of an index; none where there is no such file.

    Lines that are damaged are counted in a warning: what they named is fetched anew.
    """
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return
    records = [_parsed(line) for line in lines]
    damaged = sum(record is None for record in records[:-1])  # the last may be half-written
    if damaged:
        logger.warning("%s: damaged lines are left out (%d)", file, damaged)
    yield from (record for record in records if record is not None)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _is_sound(record) else None


def _is_sound(record: dict[str, Any]) -> bool:
    """Whether a line says what such lines say."""
    if "name" not in record:
        checked, names = record.get("checked"), record.get("names")
        noted = isinstance(checked, int | float) and isinstance(names, str)
        return noted or isinstance(record.get("url"), str)
    seal, size, digest = record.get("seal"), record.get("size"), str(record.get("digest"))
    return (
        isinstance(record["name"], str)
        and isinstance(record.get("mark"), str)
        and (size is None or isinstance(size, int))
        and re.fullmatch("[0-9a-f]{64}", digest) is not None
        and isinstance(seal, list)
        and [type(part) for part in seal] == [int, int, int]
    )


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _digest_of(names: Iterable[str]) -> str:
    text = "\0".join(sorted(set(names)))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
