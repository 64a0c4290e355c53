"""Records that many processes read and write at once, some of which are killed."""

import errno
import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d3etr.errors import UserError
from d3etr.storage.cache import Cache
from d3etr.storage.records import WINDOW, RecordFile, ensure_room

SIZE = 3_000
LIMIT = 256 * (SIZE + 64)
WRITER = """
import hashlib, sys
from pathlib import Path
from d3etr.storage.records import RecordFile
size, limit, first, last = map(int, sys.argv[2:6])
file = RecordFile(Path(sys.argv[1]), size, limit)
print("ready", flush=True)
while True:
    for number in range(first, last):
        key = hashlib.sha256(str(number).encode()).digest()
        file.write(key, memoryview((key * size)[:size]))
    if sys.argv[6] == "once":
        break
"""


def key_of(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def record_of(key: bytes) -> bytes:
    return (key * SIZE)[:SIZE]


def found(file: RecordFile, key: bytes) -> bytes | None:
    record = bytearray(SIZE)
    return bytes(record) if file.read(key, memoryview(record)) else None


def keep(file: RecordFile, *keys: bytes) -> list[bool]:
    return [file.write(key, memoryview(record_of(key))) for key in keys]


def start_writer(path: Path, first: int, last: int, mode: str) -> subprocess.Popen[bytes]:
    """A process that writes the records of these numbers; its first line says that it begins."""
    numbers = map(str, (SIZE, LIMIT, first, last))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "platform")}
    command = [sys.executable, "-c", WRITER, str(path), *numbers, mode]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "some.records"


@pytest.fixture
def file(path: Path) -> RecordFile:
    return RecordFile(path, SIZE, LIMIT)


def test_what_was_written_is_read_by_whoever_opens_the_file(file: RecordFile, path: Path) -> None:
    keys = [key_of(number) for number in range(100)]
    assert all(keep(file, *keys[:50]))
    file.close()
    again = RecordFile(path, SIZE, LIMIT)
    assert [found(again, key) for key in keys[:50]] == [record_of(key) for key in keys[:50]]
    assert not any(found(again, key) for key in keys[50:])


def test_the_file_never_exceeds_its_limit_and_is_nearly_filled(
    file: RecordFile, path: Path
) -> None:
    keys = [key_of(number) for number in range(2 * file.capacity)]
    kept = keep(file, *keys)
    assert path.stat().st_size <= LIMIT
    assert 0.9 * file.capacity <= sum(kept) <= file.capacity
    for key, there in zip(keys, kept, strict=True):
        assert found(file, key) == (record_of(key) if there else None)
    assert keep(file, keys[0]) == [True], "a record that is there needs no place"


def test_an_empty_file_takes_no_room(file: RecordFile, path: Path, tmp_path: Path) -> None:
    assert path.stat().st_size > 100 * SIZE
    assert 512 * path.stat().st_blocks < SIZE


def test_keys_with_one_home_share_its_window(file: RecordFile) -> None:
    keys = [bytes(8) + key_of(number)[8:] for number in range(WINDOW + 1)]
    assert keep(file, *keys) == [True] * WINDOW + [False]
    assert all(found(file, key) == record_of(key) for key in keys[:WINDOW])


@pytest.mark.parametrize("seed", range(5))
def test_damage_anywhere_is_never_read_as_a_record(file: RecordFile, path: Path, seed: int) -> None:
    keys = [key_of(number) for number in range(40)]
    keep(file, *keys)
    content, chance = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(60):
        at = chance.randrange(len(content))
        content[at : at + 500] = chance.randbytes(500)
    path.write_bytes(content[: path.stat().st_size])
    left = [key for key in keys if found(file, key) is not None]
    assert len(left) < len(keys)
    assert all(found(file, key) == record_of(key) for key in left)


def test_a_damaged_record_is_replaced(file: RecordFile, path: Path) -> None:
    keep(file, key_of(0))
    content = path.read_bytes()
    at = content.index(record_of(key_of(0)))
    path.write_bytes(content[:at] + b"\0" * 9 + content[at + 9 :])
    assert found(file, key_of(0)) is None
    keep(file, key_of(0))
    assert found(file, key_of(0)) == record_of(key_of(0))


def test_a_truncated_file_has_lost_records_and_no_more(file: RecordFile, path: Path) -> None:
    keep(file, key_of(0))
    os.truncate(path, path.stat().st_size // 8)
    assert found(file, key_of(0)) is None
    keep(file, key_of(0))
    assert found(file, key_of(0)) == record_of(key_of(0))


def test_killed_writers_leave_a_file_that_is_right(path: Path) -> None:
    for attempt in range(3):
        writer = start_writer(path, 0, 120, "forever")
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.01 + 0.02 * attempt)
        writer.kill()
        writer.wait()
    file = RecordFile(path, SIZE, LIMIT)
    keys = [key_of(number) for number in range(120)]
    assert any(found(file, key) for key in keys)
    assert all(found(file, key) in (None, record_of(key)) for key in keys)
    assert all(keep(file, *keys))
    assert all(found(file, key) == record_of(key) for key in keys)


def test_processes_that_write_at_once_spoil_nothing(path: Path) -> None:
    spans = [(0, 90), (45, 135), (0, 135)]
    writers = [start_writer(path, *span, "once") for span in spans]
    file = RecordFile(path, SIZE, LIMIT)
    keys = [key_of(number) for number in range(135)]
    while any(writer.poll() is None for writer in writers):
        assert all(found(file, key) in (None, record_of(key)) for key in keys)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    # Two that take one place at the same moment lose a record; it is written when it is missed.
    assert sum(found(file, key) == record_of(key) for key in keys) > 100
    keep(file, *keys)
    assert all(found(file, key) == record_of(key) for key in keys)


def test_a_write_that_the_disk_cuts_short_is_an_error_and_no_record(
    file: RecordFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, at: whole(file, content[:10], at))
    with pytest.raises(OSError, match="No space left") as caught:
        keep(file, key_of(0))
    assert caught.value.errno == errno.ENOSPC
    assert found(file, key_of(0)) is None


def test_a_limit_of_a_few_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold 63 records"):
        RecordFile(tmp_path / "few.records", SIZE, 63 * (SIZE + 64))


def test_a_disk_that_the_file_would_fill_is_refused(
    monkeypatch: pytest.MonkeyPatch, path: Path, file: RecordFile
) -> None:
    cache = Cache(path.parent)
    monkeypatch.setattr(Cache, "free_bytes", lambda _: 3 * 10**9)
    ensure_room(cache, path, 10**9, "some.key")
    with pytest.raises(UserError, match=r"some\.key: the file may grow by 2\.5 GB.* 3\.0 GB free"):
        ensure_room(cache, path, int(2.5e9), "some.key")
