"""The files of one URL as the storage has them: what they are like, and their bytes."""

from __future__ import annotations

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
    "ETag",
    "etag",
    "md5Hash",
    "Content-MD5",
    "Digest",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "modified",
    "created",
)
"""What storages call that which changes with a file's content; the first one there counts."""


@dataclass(frozen=True)
class Stamp:
    """What a storage says about a file's content: equal stamps are taken for equal content.

    Attributes:
        size: bytes; None where the storage does not say.
        mark: an entity tag, a checksum or the time of the last change; "" where it has none.
    """

    size: int | None
    mark: str

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Stamp:
        """The stamp in what fsspec says about a file."""
        mark = next((str(info[key]) for key in _MARKS if info.get(key) is not None), "")
        size = info.get("size")
        return cls(None if size is None else int(size), mark.strip('"'))


class StoppedError(Exception):
    """A transfer was given up because another one failed."""


class Remote:
    """A file, or a folder of files, on a storage.

    Args:
        url: of the folder; of the file itself where ``single``.
        single: the only name is the file's own.

    It is opened when it is asked for the first time, which may take as long as the answer.
    """

    def __init__(self, url: Url, *, single: bool = False) -> None:
        self.url, self._single = url, single
        self._stop = threading.Event()

    def ensure_answer(self, name: str) -> Stamp:
        """The stamp of one file, within ``ANSWER_SECONDS``.

        Raises:
            UserError: it is not there, there is no answer, or no way to read such URLs here.
        """
        return within(ANSWER_SECONDS, self.url_of(name), lambda: self._stamp(name))

    def folder_exists(self) -> bool:
        """Whether the folder is there, within ``ANSWER_SECONDS``; True where none can be listed.

        Raises:
            UserError: no answer, or access refused.
        """
        if self._over_http:
            return True

        def look() -> bool:
            with _explained(self.url):
                return bool(self._files.exists(self._root))

        return within(ANSWER_SECONDS, self.url, look)

    def stamps(self, names: Iterable[str]) -> Iterator[tuple[str, Stamp | None]]:
        """Every file's stamp, None for those that are not there.

        Raises:
            UserError: the storage does not answer, or refuses.
        """
        folders = {name: posixpath.dirname(name) for name in dict.fromkeys(names)}
        if not folders:
            return
        first = next(iter(folders))
        yield first, self._first_answer(first)
        del folders[first]
        sizes = Counter(folders.values())
        listed = {f for f, count in sizes.items() if count >= LISTED_FROM and not self._over_http}
        for folder in sorted(listed):
            found = self._list(folder)
            for name in (name for name, place in folders.items() if place == folder):
                yield name, found.get(posixpath.basename(name))
        single = [name for name, folder in folders.items() if folder not in listed]
        yield from self._at_once(self._stamp_or_none, single)

    def fetch(
        self,
        targets: Mapping[str, tuple[Path, Stamp]],
        finish: Callable[[Path], T],
        told: Callable[[int], None],
    ) -> Iterator[tuple[str, T]]:
        """Copy files here, several at a time; yields each one's name once it is complete.

        Args:
            targets: name -> where to write it, and the stamp that its size is checked with.
            finish: called with each complete file; what it returns is yielded with the name.
            told: given the number of bytes that arrived.

        ``finish`` and ``told`` are called by several threads.

        Raises:
            UserError: one of them could not be had.
            OSError: this machine's disk is full.
        """

        def get(name: str) -> T:
            target, stamp = targets[name]
            self._get(name, target, stamp, told)
            return finish(target)

        yield from self._at_once(get, list(targets))

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

    @property
    def _root(self) -> str:
        return self._opened[1]

    @property
    def _over_http(self) -> bool:
        return self.url.protocol in ("http", "https")

    def _place(self, name: str) -> str:
        """A file as its file system calls it."""
        if self._over_http:
            return self.url_of(name).text
        return self._root if self._single else f"{self._root.rstrip('/')}/{name}"

    def _first_answer(self, name: str) -> Stamp | None:
        """A file's stamp; finds out within the time limit whether the storage answers at all."""
        try:
            return self.ensure_answer(name)
        except MissingFileError:
            if not self._single and not self.folder_exists():
                raise MissingFileError(
                    f"{self.url.shown} is no folder with files in it: check the URL"
                ) from None
            return None

    def _stamp(self, name: str) -> Stamp:
        with _explained(self.url_of(name)):
            # Listings that a file system keeps would hide that a file has changed.
            self._files.invalidate_cache()
            info = self._files.info(self._place(name))
            if info.get("type") == "directory":
                raise FileNotFoundError(name)
            return Stamp.of(info)

    def _stamp_or_none(self, name: str) -> Stamp | None:
        try:
            return self._stamp(name)
        except MissingFileError:
            return None

    def _list(self, folder: str) -> dict[str, Stamp]:
        place = f"{self._root.rstrip('/')}/{folder}".rstrip("/")
        with _explained(self.url):
            self._files.invalidate_cache()
            try:
                found = self._files.ls(place, detail=True)
            except FileNotFoundError:
                return {}
        return {posixpath.basename(i["name"]): Stamp.of(i) for i in found if i["type"] == "file"}

    def _get(self, name: str, target: Path, stamp: Stamp, told: Callable[[int], None]) -> None:
        """Fetch one file, trying again where the network failed."""
        for pause in (*PAUSES_SECONDS, None):
            try:
                self._files.get_file(
                    self._place(name), str(target), callback=_Arrived(told, self._stop)
                )
                size = target.stat().st_size
                if stamp.size in (None, size):
                    return
                raise OSError(f"{size} bytes arrived of {stamp.size}")
            except Exception as error:
                target.unlink(missing_ok=True)
                if isinstance(error, StoppedError) or self._stop.is_set():
                    raise StoppedError from None
                if disk_is_full(error):
                    raise
                if pause is None or is_final(error):
                    raise explained(self.url_of(name), error) from error
            time.sleep(pause)

    def _at_once(self, do: Callable[[str], T], names: list[str]) -> Iterator[tuple[str, T]]:
        """``do`` for each name, several at a time, as they finish; the first failure ends all."""
        pool = ThreadPoolExecutor(max(1, min(CONNECTIONS, len(names))))
        try:
            begun = {pool.submit(do, name): name for name in names}
            for done in as_completed(begun):
                yield begun[done], done.result()
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class _Arrived(Callback):  # type: ignore[misc]
    """Passes on how many bytes arrived, and ends the transfer when it is told to."""

    def __init__(self, told: Callable[[int], None], stop: threading.Event) -> None:
        super().__init__()
        self._told, self._stop = told, stop

    def relative_update(self, inc: int = 1) -> None:
        """``inc`` more bytes arrived."""
        if self._stop.is_set():
            raise StoppedError
        self._told(inc)


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
