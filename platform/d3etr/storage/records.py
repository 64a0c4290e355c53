"""Records of one size by key, in one file of bounded size that many processes use at once.

    table     [capacity] entries of 64 bytes: key, seal
    records   [capacity] of ``record_bytes``

A record lies in one of the ``WINDOW`` places from that on which its key points to. Nobody waits
for anybody and nothing is repaired: the seal is the SHA-256 of key and record, so what a killed
process left, or what two made of one place, is not read as a record. The file is sparse: it takes
the room of what is in it.

Reads and writes are ``pread`` and ``pwrite``, not a memory map. The pages are as shared and the
time is the same, but a map of a full or failing disk ends the process with a signal, and what is
read from one may change after it was checked.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

from d3etr.errors import UserError
from d3etr.storage.cache import FOLDER_VARIABLE, Cache, allocated_bytes, megabytes

WINDOW = 64
"""Places of a key: full up to nine tenths, a file still has one for nearly every key."""
_DIGEST_BYTES = 32
_ENTRY_BYTES = 2 * _DIGEST_BYTES
_EMPTY = bytes(_DIGEST_BYTES)
_SPARE_BYTES = 2**30
"""Left free for what runs beside."""


def smallest(record_bytes: int) -> int:
    """Bytes that a file of such records has at least."""
    return WINDOW * (record_bytes + _ENTRY_BYTES)


class RecordFile:
    """An open file of records.

    Args:
        path: the file; made if it is not there. Who opens it again must say the same sizes.
        record_bytes: of each record.
        limit_bytes: that the file never exceeds.

    Attributes:
        path: the file.
        capacity: records that it has room for.

    Raises:
        OSError: the file cannot be made.
        ValueError: the limit is below ``smallest``.
    """

    def __init__(self, path: Path, record_bytes: int, limit_bytes: int) -> None:
        self.path, self._record_bytes = path, record_bytes
        self.capacity = limit_bytes // (record_bytes + _ENTRY_BYTES)
        if limit_bytes < smallest(record_bytes):
            raise ValueError(f"{limit_bytes} bytes hold {self.capacity} records, not {WINDOW}")
        self._homes = self.capacity - WINDOW + 1
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            os.ftruncate(self._file, self.capacity * (record_bytes + _ENTRY_BYTES))
        except OSError:
            self.close()
            raise

    def read(self, key: bytes, record: memoryview) -> bool:
        """Fill ``record`` with the key's; False, and anything in ``record``, if there is none.

        Args:
            key: 32 bytes, evenly spread.
            record: ``record_bytes`` writable bytes.
        """
        home, keys, seals = self._places(key)
        if key not in keys:
            return False
        place = keys.index(key)
        read = os.preadv(self._file, [record], self._offset(home + place))
        return read == self._record_bytes and _seal(key, record) == seals[place]

    def write(self, key: bytes, record: memoryview) -> bool:
        """Keep a record; False if there is no place left for it.

        Args:
            key: 32 bytes, evenly spread.
            record: ``record_bytes`` bytes.

        Raises:
            OSError: above all, no space is left on the disk.
        """
        home, keys, _ = self._places(key)
        wanted = key if key in keys else _EMPTY
        if wanted not in keys:
            return False
        place = home + keys.index(wanted)
        self._put(record, self._offset(place))
        self._put(memoryview(key + _seal(key, record)), place * _ENTRY_BYTES)
        return True

    def close(self) -> None:
        """No more reads and writes."""
        os.close(self._file)

    def _places(self, key: bytes) -> tuple[int, list[bytes], list[bytes]]:
        """The first place of a key, and keys and seals of all its places."""
        home = int.from_bytes(key[:8]) % self._homes
        table = os.pread(self._file, WINDOW * _ENTRY_BYTES, home * _ENTRY_BYTES)
        parts = [table[i : i + _DIGEST_BYTES] for i in range(0, len(table), _DIGEST_BYTES)]
        return home, parts[::2], parts[1::2]

    def _offset(self, place: int) -> int:
        return self.capacity * _ENTRY_BYTES + place * self._record_bytes

    def _put(self, content: memoryview, offset: int) -> None:
        if os.pwrite(self._file, content, offset) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _seal(key: bytes, record: memoryview) -> bytes:
    digest = hashlib.sha256(key)
    digest.update(record)
    return digest.digest()


def ensure_room(cache: Cache, file: Path, limit_bytes: int, setting: str) -> None:
    """Refuse a file that would fill this machine's disk as it grows.

    Args:
        cache: its folder must be there.
        file: in the cache.
        limit_bytes: that the file may grow to.
        setting: the key that says so.

    Raises:
        UserError: there is less space than that, and a gigabyte for all else.
    """
    needed = limit_bytes - (allocated_bytes(file) if file.exists() else 0)
    free = cache.free_bytes()
    if needed > free - _SPARE_BYTES:
        raise UserError(
            f"{setting}: the file may grow by {megabytes(needed)}, but the cache's disk has "
            f"{megabytes(free)} free, of which {megabytes(_SPARE_BYTES)} are left alone "
            f"({cache.folder}). Lower it, free some space ('d3etr cache' shows what the cache "
            f"holds), or set {FOLDER_VARIABLE} to a folder with more"
        )
