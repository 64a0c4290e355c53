"""The files of one URL as the storage has them: their versions, and their bytes."""

from __future__ import annotations

import hashlib
import logging
import posixpath
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from d3etr.config.location import Url
from d3etr.errors import UserError
from d3etr.storage.problems import (
    GOOGLE,
    MissingFileError,
    disk_is_full,
    explained,
    is_final,
    missing_package,
    timed_out,
    unknown_protocol,
)

T = TypeVar("T")
ANSWER_SECONDS = 20.0
"""How long a storage may take to say whether a file is there."""
CONNECTIONS = 24
"""Files that are asked for, or fetched, at a time."""
LISTED_FROM = 64
"""So many files in one folder are looked up by listing it; fewer one by one."""
PAUSES_SECONDS = (1.0, 5.0)
"""Between attempts to fetch a file."""
_MARKS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "Last-Modified", "LastModified"),
    *("last_modified", "updated", "mtime", "modified", "created"),
)
"""What storages call that which changes with a file's content; the first one there counts."""


@dataclass(frozen=True)
class RemoteVersion:
    """What a storage states about a file's content: equal versions are taken for equal content.

    Attributes:
        size: bytes; None where the storage does not say.
        mark: an entity tag, a checksum or the time of the last change; "" where it has none.
    """

    size: int | None
    mark: str

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> RemoteVersion:
        """The version in what fsspec says about a file."""
        mark = next((str(info[key]) for key in _MARKS if info.get(key) is not None), "")
        size = info.get("size")
        return cls(None if size is None else int(size), mark.strip('"'))

    def key(self, name: str) -> str:
        """24 hex digits for this version of the file of that name."""
        text = f"{name}\0{self.size}\0{self.mark}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


class StoppedError(Exception):
    """A transfer was given up because another one failed, or the program is to end."""


class RemoteFiles:
    """A file, or a folder of files, on a storage.

    Args:
        url: of the folder; of the file itself where ``single``.
        single: the only name is the file's own.

    It is opened when it is asked for the first time, which may take as long as the answer.
    """

    def __init__(self, url: Url, *, single: bool = False) -> None:
        self.url, self._single = url, single
        self._over_http = url.protocol in ("http", "https")
        self._stop = threading.Event()

    def ensure_there(self) -> None:
        """Make sure, within ``ANSWER_SECONDS``, that the file or folder exists.

        A folder that only HTTP leads to cannot be asked for without the name of a file.

        Raises:
            UserError: it is not there, or there is no answer.
        """
        if self._single:
            within(ANSWER_SECONDS, self.url, lambda: self._version(self.url.name))
        elif not self._over_http and not within(ANSWER_SECONDS, self.url, self._folder_exists):
            raise MissingFileError(f"{self.url.shown} is no folder with files in it: check the URL")

    def versions(self, names: Iterable[str]) -> Iterator[tuple[str, RemoteVersion | None]]:
        """Every file's version, None for those that are not there.

        The first one shows within ``ANSWER_SECONDS`` whether the storage answers at all.

        Raises:
            UserError: the storage does not answer, or refuses.
        """
        folders = {name: posixpath.dirname(name) for name in dict.fromkeys(names)}
        if not folders:
            return
        first = next(iter(folders))
        url = self.url_of(first)
        version = within(ANSWER_SECONDS, url, lambda: self._version_or_none(first))
        if version is None and not self._single:
            self.ensure_there()
        yield first, version
        del folders[first]
        sizes = Counter(folders.values())
        listed = {f for f, count in sizes.items() if count >= LISTED_FROM and not self._over_http}
        for folder in sorted(listed):
            found = self._list(folder)
            for name in (name for name, place in folders.items() if place == folder):
                yield name, found.get(posixpath.basename(name))
        single = [name for name, folder in folders.items() if folder not in listed]
        yield from self.at_once(self._version_or_none, single)

    def get(
        self, name: str, target: Path, version: RemoteVersion, on_bytes: Callable[[int], None]
    ) -> None:
        """Copy one file here, trying again where the network failed.

        Args:
            name: of the file.
            target: where to write it; nothing is left there on failure.
            version: its size is checked.
            on_bytes: takes the number of bytes that arrived.

        Raises:
            UserError: it could not be had.
            OSError: this machine's disk is full.
        """
        for pause in (*PAUSES_SECONDS, None):
            try:
                arrived = _Arrived(on_bytes, self._stop)
                self._files.get_file(self._place(name), str(target), callback=arrived)
                size = target.stat().st_size
                if version.size in (None, size):
                    return
                raise OSError(f"{size} bytes arrived of {version.size}")
            except Exception as error:
                target.unlink(missing_ok=True)
                if isinstance(error, StoppedError) or self._stop.is_set():
                    raise StoppedError from None
                if disk_is_full(error):
                    raise
                if pause is None or is_final(error):
                    raise explained(self.url_of(name), error) from error
            time.sleep(pause)

    def at_once(self, do: Callable[[str], T], names: list[str]) -> Iterator[tuple[str, T]]:
        """``do`` for each name, several at a time, as they finish; the first failure ends all."""
        pool = ThreadPoolExecutor(max(1, min(CONNECTIONS, len(names))))
        try:
            futures = {pool.submit(do, name): name for name in names}
            for done in as_completed(futures):
                yield futures[done], done.result()
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def url_of(self, name: str) -> Url:
        """The URL of one file."""
        if self._single:
            return self.url
        if self._over_http:
            parts = urlsplit(self.url.text)
            return Url(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl())
        return Url(f"{self.url.text.rstrip('/')}/{name}")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return _open(self.url)

    @property
    def _files(self) -> Any:
        return self._opened[0]

    def _place(self, name: str) -> str:
        """A file as its file system calls it."""
        if self._over_http:
            return self.url_of(name).text
        root = self._opened[1]
        return root if self._single else f"{root.rstrip('/')}/{name}"

    def _folder_exists(self) -> bool:
        with _explained(self.url):
            return bool(self._files.exists(self._opened[1]))

    def _version(self, name: str) -> RemoteVersion:
        with _explained(self.url_of(name)):
            # Listings that a file system keeps would hide that a file has changed.
            self._files.invalidate_cache()
            info = self._files.info(self._place(name))
            if info.get("type") == "directory":
                raise FileNotFoundError(name)
            return RemoteVersion.of(info)

    def _version_or_none(self, name: str) -> RemoteVersion | None:
        try:
            return self._version(name)
        except MissingFileError:
            return None

    def _list(self, folder: str) -> dict[str, RemoteVersion]:
        with _explained(self.url):
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._place(folder).rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
        files = [info for info in found if info["type"] == "file"]
        return {posixpath.basename(info["name"]): RemoteVersion.of(info) for info in files}


class _Arrived(Callback):  # type: ignore[misc]
    """Passes on how many bytes arrived, and ends the transfer once others have failed."""

    def __init__(self, on_bytes: Callable[[int], None], stop: threading.Event) -> None:
        super().__init__()
        self._on_bytes, self._stop = on_bytes, stop

    def relative_update(self, inc: int = 1) -> None:
        """``inc`` more bytes arrived."""
        if self._stop.is_set():
            raise StoppedError
        self._on_bytes(inc)


def ensure_reachable(files: Iterable[tuple[str, Url]], folders: Iterable[tuple[str, Url]]) -> None:
    """Ask for every file and folder at once, within seconds; nothing is fetched.

    Args:
        files: configuration key and URL of each.
        folders: configuration key and URL of each.

    Raises:
        UserError: what is not there or does not answer, every one of them.
    """
    asked = [(key, RemoteFiles(url, single=True)) for key, url in files]
    asked += [(key, RemoteFiles(url)) for key, url in folders]
    if not asked:
        return

    def problem(one: tuple[str, RemoteFiles]) -> str | None:
        try:
            one[1].ensure_there()
        except UserError as error:
            return f"{one[0]}: {error}"
        return None

    asked.sort(key=lambda one: (one[0], one[1].url.text))
    # The answers have a time limit each; they are waited for together.
    with ThreadPoolExecutor(min(CONNECTIONS, len(asked))) as pool:
        problems = [text for text in pool.map(problem, asked) if text is not None]
    if problems:
        raise UserError("\n".join(problems))


def within(seconds: float, url: Url, do: Callable[[], T]) -> T:
    """Do something that may hang, in a thread that nobody waits for longer.

    Raises:
        UnreachableError: it took longer than ``seconds``.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(do())
        except BaseException as error:
            failed.append(error)

    # Not a pool: at its end Python would wait for the pool's threads.
    thread = threading.Thread(target=run, name="storage-answer", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise timed_out(url, seconds)
    return done[0]


def _open(url: Url) -> tuple[Any, str]:
    try:
        files, root = url_to_fs(url.text, **_limits(url))
    except ImportError as error:
        raise missing_package(url, error) from error
    except ValueError as error:
        known = url.protocol in known_implementations
        raise (explained(url, error) if known else unknown_protocol(url)) from error
    except Exception as error:
        raise explained(url, error) from error
    return files, root


def _limits(url: Url) -> dict[str, Any]:
    """Time limits of a connection, where the defaults would end a long transfer or none."""
    if url.protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        limits = ClientTimeout(total=None, sock_connect=ANSWER_SECONDS, sock_read=60.0)
        return {"client_kwargs": {"timeout": limits}}
    if url.protocol in GOOGLE:
        # All that it says comes as an exception too.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    if url.protocol in ("s3", "s3a"):
        return {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60}}
    return {}


@contextmanager
def _explained(url: Url) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise explained(url, error) from error
