"""The files of one URL as the storage has them: their versions, and their bytes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from d3etr.config.location import Url
from d3etr.errors import UserError
from d3etr.progress import OnProgress
from d3etr.storage.problems import (
    GOOGLE,
    HTTP,
    MissingFileError,
    UnreachableError,
    disk_is_full,
    explained,
    timed_out,
)

T = TypeVar("T")
ANSWER_SECONDS = 20.0
"""How long a storage may take to say whether a file is there."""
CONNECTIONS = 24
"""Files that are asked for, or fetched, at a time."""
PAUSES_SECONDS = (1.0, 5.0)
"""Between attempts to fetch a file."""
_OF_THE_QUESTION = frozenset({"url", "time", "accessTime", "last_accessed_on"})
"""What fsspec says that differs from one question to the next: over HTTP where redirects end, which
may be signed anew, and when a file was last read, over SFTP and SMB, HDFS, and in Azure."""


class Version(NamedTuple):
    """What a storage states about a file: equal versions are taken for equal content.

    Attributes:
        size: bytes; None where the storage does not say.
        facts: what it says of the file, among it an entity tag, a checksum or the time of the
            last change.
    """

    size: int | None
    facts: str

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Version:
        """The version in what fsspec says about a file."""
        size = info.get("size")
        facts = sorted((k, v) for k, v in info.items() if k not in _OF_THE_QUESTION)
        return cls(None if size is None else int(size), str(facts))


class RemoteFiles:
    """A file, or a folder of files, on a storage.

    Args:
        url: of the folder; of the file itself where ``single``.
        single: the only name is the file's own.

    It is opened when it is asked for the first time, which may take as long as the answer.
    """

    def __init__(self, url: Url, *, single: bool = False) -> None:
        self.url, self._single = url, single
        self._one_by_one = single or url.protocol in HTTP

    def ensure_there(self) -> None:
        """Make sure, within ``ANSWER_SECONDS``, that the file or folder exists.

        A folder that only HTTP leads to cannot be asked for without the name of a file.

        Raises:
            UserError: it is not there, or there is no answer.
        """
        if self._single:
            self._within(lambda: self._version(self.url.name))
        elif not self._one_by_one and not self._within(lambda: self._files.exists(self._root)):
            raise MissingFileError(f"{self.url.shown} is no folder with files in it: check the URL")

    def versions(self, names: Sequence[str], on_progress: OnProgress) -> dict[str, Version]:
        """The version of every file that is there.

        Raises:
            UserError: the storage does not answer, or refuses.
        """
        if not names:
            return {}
        if not self._one_by_one:
            self.ensure_there()
            with _explained(self.url):
                listed = self._files.find(self._root, detail=True)
            here = {self._place(name): name for name in names}
            return {here[at]: Version.of(info) for at, info in listed.items() if at in here}
        found = {names[0]: self._within(lambda: self._version_or_none(names[0]))}
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            others = zip(names[1:], pool.map(self._version_or_none, names[1:]), strict=True)
            for count, (name, version) in enumerate(others, start=2):
                found[name] = version
                on_progress(f"looking up {self.url.shown}", count, len(names))
        return {name: version for name, version in found.items() if version is not None}

    def get(
        self, name: str, target: Path, version: Version, on_progress: OnProgress | None
    ) -> None:
        """Copy one file here, trying again where the network failed.

        Args:
            name: of the file.
            target: where to write it; nothing is left there on failure.
            version: its size is checked.
            on_progress: takes the megabytes that arrived.

        Raises:
            UserError: it could not be had.
            OSError: this machine's disk is full.
        """
        total = -(-(version.size or 0) // 10**6)

        def arrived(_size: int, value: int, **_: object) -> None:
            if on_progress is not None:
                on_progress(f"fetching {self.url.shown}, MB", value // 10**6, total)

        for pause in (*PAUSES_SECONDS, None):
            try:
                callback = Callback(hooks={"arrived": arrived})
                self._files.get_file(self._place(name), str(target), callback=callback)
                size = target.stat().st_size
                if version.size in (None, size):
                    return
                raise OSError(f"{size} bytes arrived of {version.size}")
            except Exception as error:
                target.unlink(missing_ok=True)
                if disk_is_full(error):
                    raise
                problem = explained(self._url_of(name), error)
                if pause is None or not isinstance(problem, UnreachableError):
                    raise problem from error
            time.sleep(pause)

    def _url_of(self, name: str) -> Url:
        if self._single:
            return self.url
        if self.url.protocol in HTTP:
            parts = urlsplit(self.url.text)
            return Url(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl())
        return Url(f"{self.url.text.rstrip('/')}/{name}")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        with _explained(self.url):
            files, root = url_to_fs(self.url.text, **_limits(self.url))
            # Listings that a file system keeps would hide that a file has changed.
            files.invalidate_cache()
            return files, root.rstrip("/")

    @property
    def _files(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    def _place(self, name: str) -> str:
        """A file as its file system calls it."""
        if self.url.protocol in HTTP:
            return self._url_of(name).text
        return self._root if self._single else f"{self._root}/{name}"

    def _version(self, name: str) -> Version:
        with _explained(self._url_of(name)):
            info = self._files.info(self._place(name))
            if info.get("type") == "directory":
                raise FileNotFoundError(name)
            return Version.of(info)

    def _version_or_none(self, name: str) -> Version | None:
        try:
            return self._version(name)
        except MissingFileError:
            return None

    def _within(self, do: Callable[[], T]) -> T:
        """Do something that may hang, in a thread that nobody waits for longer."""
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                with _explained(self.url):
                    results.append(do())
            except BaseException as error:
                errors.append(error)

        # Not a pool: at its end Python would wait for the pool's threads.
        thread = threading.Thread(target=run, name="storage-answer", daemon=True)
        thread.start()
        thread.join(ANSWER_SECONDS)
        if errors:
            raise errors[0]
        if not results:
            raise timed_out(self.url, ANSWER_SECONDS)
        return results[0]


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
    asked.sort(key=lambda one: (one[0], one[1].url.text))

    def problem(one: tuple[str, RemoteFiles]) -> str:
        try:
            one[1].ensure_there()
        except UserError as error:
            return f"{one[0]}: {error}"
        return ""

    # The answers have a time limit each; they are waited for together.
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        problems = [text for text in pool.map(problem, asked) if text]
    if problems:
        raise UserError("\n".join(problems))


def _limits(url: Url) -> dict[str, Any]:
    """Time limits of a connection, where the defaults would end a long transfer or none."""
    if url.protocol in HTTP:
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
    except UserError:
        raise
    except Exception as error:
        raise explained(url, error) from error
