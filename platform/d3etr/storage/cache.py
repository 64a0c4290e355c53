"""Files on this machine that were fetched from storage, each under the SHA-256 of its content.

Content that changes on the storage gets another name here: what a running training reads never
changes under it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from d3etr.config.location import Url
from d3etr.errors import UserError
from d3etr.storage.problems import disk_is_full

FOLDER_VARIABLE = "D3ETR_CACHE"
_LOCK_POLL_SECONDS = 0.1
_TOLD_SECONDS = 2.0
"""A wait for another process is worth a word after this time."""
_SPARE_BYTES = 64 * 2**20


class Seal(NamedTuple):
    """What a file's attributes were when its content was last checked.

    Every write changes the times; the second one cannot be set by programs.
    """

    size: int
    modified: int
    changed: int


@dataclass(frozen=True)
class Cache:
    """A folder of fetched files.

    Attributes:
        folder: ``objects`` holds content, ``index`` what is known of each URL.
    """

    folder: Path

    def object(self, digest: str) -> Path:
        """Where the content with that SHA-256 is, or would be."""
        return self.folder / "objects" / digest[:2] / digest

    def index(self, url: Url) -> Path:
        """The file that says what is known of a URL."""
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", url.shown)[-60:].strip("-.")
        key = hashlib.sha256(url.text.encode()).hexdigest()[:16]
        return self.folder / "index" / f"{slug}-{key}.jsonl"

    def partial(self, index: Path) -> Path:
        """A fresh name for a file that is being fetched for that index."""
        return self.folder / "partial" / f"{index.stem}.{uuid.uuid4().hex}"

    def remove_partials(self, index: Path) -> None:
        """Remove what a process left that died while it fetched; needs the index's lock."""
        for left in (self.folder / "partial").glob(f"{index.stem}.*"):
            left.unlink(missing_ok=True)

    def adopt(self, file: Path) -> tuple[str, Seal]:
        """Give a complete file its place by content.

        Args:
            file: on the cache's file system; it is moved.

        Returns:
            Its SHA-256, hex, and its seal.
        """
        digest = sha256(file)
        target = self.object(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.chmod(0o444)
        os.replace(file, target)
        return digest, seal_of(target)

    def make(self) -> None:
        """Make the folders.

        Raises:
            OSError: they cannot be made.
        """
        for name in ("objects", "index", "partial"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def free_bytes(self) -> int:
        """Of the disk that the cache is on."""
        return shutil.disk_usage(self.folder).free

    def ensure_room(self, needed: int, url: Url) -> None:
        """Refuse to fetch what this disk cannot hold.

        Args:
            needed: bytes.
            url: what is to be fetched.

        Raises:
            UserError: there is not so much space.
        """
        free = self.free_bytes()
        if needed > free - _SPARE_BYTES:
            raise UserError(
                f"{url.shown}: {megabytes(needed)} are to be fetched, but the cache's disk has "
                f"{megabytes(free)} free ({self.folder}). Free some space ('d3etr cache' shows "
                f"what the cache holds), or set {FOLDER_VARIABLE} to a folder with more"
            )


def open_cache() -> Cache:
    """This machine's cache, in ``D3ETR_CACHE`` or the user's cache folder."""
    place = os.environ.get(FOLDER_VARIABLE)
    if place:
        return Cache(Path(place).expanduser().absolute())
    home = os.environ.get("XDG_CACHE_HOME")
    folder = Path(home) if home else Path("~/.cache").expanduser()
    return Cache(folder.absolute() / "d3etr")


@contextmanager
def clear_cache_errors(cache: Cache) -> Iterator[None]:
    """Say what to do about a cache that cannot be written.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    try:
        yield
    except OSError as error:
        what = "is full" if disk_is_full(error) else "cannot be used"
        raise UserError(
            f"the cache {cache.folder} {what} ({error.strerror or error}): set {FOLDER_VARIABLE} "
            "to a folder that is writable and has enough space, where each machine's processes "
            "start"
        ) from error


@contextmanager
def locked(file: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock among this machine's processes; it ends with the process, however that ends.

    Args:
        file: the lock; it stays.
        waiting: called once if another process holds it for longer than a moment.
    """
    handle = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        begun, told = time.monotonic(), False
        while not _try_lock(handle):
            if not told and time.monotonic() - begun > _TOLD_SECONDS:
                told = True
                waiting()
            time.sleep(_LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def seal_of(file: Path) -> Seal:
    """The file's seal.

    Raises:
        FileNotFoundError: there is no such file.
    """
    status = file.stat()
    return Seal(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def megabytes(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
