"""Copies of remote files on this machine: a folder for each URL, a file for each version.

A copy's name holds the version that the storage stated, its size and the SHA-256 of its content.
What changes on the storage becomes another file here, so nothing that a running training reads
changes under it, and a fetch that was interrupted finds what it had.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d3etr.config.location import Url
from d3etr.errors import UserError
from d3etr.files import DamagedFileError, atomic_write, read_json, sha256
from d3etr.logs import get_logger
from d3etr.storage.problems import disk_is_full

logger = get_logger(__name__)

FOLDER_VARIABLE = "D3ETR_CACHE"
_FOLDERS = ("files", "objects", "index", "partial", "teachers")
"""What may be in a cache; all but the first are an earlier version's."""
_COPY = re.compile("([0-9a-f]{24})-([0-9]+)-([0-9a-f]{64})")
_PARTIAL = "partial-"
_MANIFEST = "manifest.json"
_UNTOUCHED_NS = 10**18
"""Time of modification of every copy: another one shows that somebody wrote to it."""
_LOCK_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 2.0
"""A wait for another process is worth a word after this time."""
_SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class CachedFile:
    """A copy of one version of a remote file.

    Attributes:
        path: of the copy.
        version: digest of the remote file's name and version, hex.
        size: bytes.
        digest: SHA-256 of the content, hex.
    """

    path: Path
    version: str
    size: int
    digest: str

    @classmethod
    def parse(cls, path: Path) -> CachedFile | None:
        """The copy of that name; None if it is no copy's."""
        found = _COPY.fullmatch(path.name)
        return None if found is None else cls(path, found[1], int(found[2]), found[3])

    def is_intact(self, shown: str) -> bool:
        """Whether it is there, with the content that was fetched; a damaged one is removed.

        The content is read only where somebody may have written to it.

        Args:
            shown: what a warning calls the remote file.
        """
        try:
            status = self.path.stat()
            if status.st_size == self.size and status.st_mtime_ns == _UNTOUCHED_NS:
                return True
            if status.st_size == self.size and sha256(self.path) == self.digest:
                os.utime(self.path, ns=(_UNTOUCHED_NS, _UNTOUCHED_NS))
                return True
        except FileNotFoundError:
            return False
        logger.warning(
            "the cached copy of %s is damaged (%s has other content than was fetched): fetching "
            "it again",
            shown,
            self.path,
        )
        self.path.unlink(missing_ok=True)
        return False


@dataclass(frozen=True)
class Manifest:
    """What the last fetch from a URL found.

    Attributes:
        url: without credentials.
        files: name below the URL -> its copy.
        checked: which names were looked up last and all there, with a mark of that moment.
    """

    url: str
    files: Mapping[str, CachedFile] = field(default_factory=dict)
    checked: str = ""

    def has(self, names: Iterable[str]) -> bool:
        """Whether there is an intact copy of each name."""
        return all(
            name in self.files and self.files[name].is_intact(f"{self.url}/{name}")
            for name in names
        )


class CacheEntry:
    """The copies of what one URL names.

    Args:
        folder: of the cache.
        url: of a file or folder.
    """

    def __init__(self, folder: Path, url: Url) -> None:
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", url.shown)[-60:].strip("-.")
        key = hashlib.sha256(url.text.encode()).hexdigest()[:16]
        self.url, self.folder = url, folder / "files" / f"{slug}-{key}"
        self.lock = Path(f"{self.folder}.lock")

    def copies(self) -> dict[str, CachedFile]:
        """Version -> copy, of every copy that is here."""
        found = [CachedFile.parse(path) for path in self.folder.iterdir()]
        return {copy.version: copy for copy in found if copy is not None}

    def partial(self) -> Path:
        """A fresh name for a file that is being fetched."""
        return self.folder / f"{_PARTIAL}{uuid.uuid4().hex}"

    def remove_partials(self) -> None:
        """Remove what a process left that died while it fetched; needs the lock."""
        for left in self.folder.glob(f"{_PARTIAL}*"):
            left.unlink(missing_ok=True)

    def ensure_room(self, needed: int) -> None:
        """Refuse to fetch what this disk cannot hold.

        Args:
            needed: bytes.

        Raises:
            UserError: there is not so much space.
        """
        free = shutil.disk_usage(self.folder).free
        if needed > free - _SPARE_BYTES:
            raise UserError(
                f"{self.url.shown}: {megabytes(needed)} are to be fetched, but the cache's disk "
                f"has {megabytes(free)} free ({self.folder.parents[1]}). Free some space ('d3etr "
                f"cache' shows what the cache holds), or set {FOLDER_VARIABLE} to a folder with "
                "more"
            )

    def adopt(self, file: Path, version: str) -> CachedFile:
        """Give a complete file its place; it is moved, so that no copy is ever half-written."""
        size, digest = file.stat().st_size, sha256(file)
        copy = CachedFile(self.folder / f"{version}-{size}-{digest}", version, size, digest)
        file.chmod(0o444)
        os.utime(file, ns=(_UNTOUCHED_NS, _UNTOUCHED_NS))
        os.replace(file, copy.path)
        return copy

    def manifest(self) -> Manifest:
        """What the last fetch found; nothing where there was none, or its file is damaged."""
        path = self.folder / _MANIFEST
        try:
            return _parsed(self.folder, self.url.shown, read_json(path))
        except FileNotFoundError:
            return Manifest(self.url.shown)
        except DamagedFileError as error:
            logger.warning("%s: asking the storage anew", error)
            return Manifest(self.url.shown)

    def write(self, manifest: Manifest) -> None:
        """Write the manifest, whole or not at all."""
        files = {name: copy.path.name for name, copy in manifest.files.items()}
        content = {"url": manifest.url, "checked": manifest.checked, "files": files}
        with atomic_write(self.folder / _MANIFEST) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")


def _parsed(folder: Path, url: str, content: Mapping[str, Any]) -> Manifest:
    """A manifest from its file; names that lead out of the folder are no copies'."""
    files, checked = content.get("files"), content.get("checked")
    if not isinstance(files, dict) or not isinstance(checked, str):
        raise DamagedFileError(f"{folder / _MANIFEST} is damaged (it has no files)")
    named = {name: CachedFile.parse(folder / str(file)) for name, file in files.items()}
    found = {name: copy for name, copy in named.items() if copy and copy.path.parent == folder}
    if len(found) < len(files):
        raise DamagedFileError(f"{folder / _MANIFEST} is damaged (it names other files)")
    return Manifest(url, found, checked)


@dataclass(frozen=True)
class Cache:
    """A folder of copies.

    Attributes:
        folder: where it is.
    """

    folder: Path

    def entry(self, url: Url) -> CacheEntry:
        """The place of a URL's copies; its folder is made.

        Raises:
            OSError: it cannot be made.
        """
        entry = CacheEntry(self.folder, url)
        entry.folder.mkdir(parents=True, exist_ok=True)
        return entry

    def size(self) -> int:
        """Bytes of everything in the cache, old versions and unfinished files included."""
        files = [file for name in _FOLDERS for file in (self.folder / name).rglob("*")]
        return sum(file.stat().st_size for file in files if file.is_file())

    def clear(self) -> int:
        """Remove everything that was fetched; a training that reads it would fail.

        Returns:
            Bytes that are free now.

        Raises:
            UserError: a file cannot be removed.
        """
        size = self.size()
        with clear_cache_errors(self):
            for name in _FOLDERS:
                if (self.folder / name).exists():
                    shutil.rmtree(self.folder / name)
        return size


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
def locked(file: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock among this machine's processes; it ends with the process, however that ends.

    Args:
        file: the lock; it stays.
        on_wait: called once if another process holds it for longer than a moment.
    """
    handle = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        start, waited = time.monotonic(), False
        while not _try_lock(handle):
            if not waited and time.monotonic() - start > _PATIENCE_SECONDS:
                waited = True
                on_wait()
            time.sleep(_LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def megabytes(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
