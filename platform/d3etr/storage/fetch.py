"""Bringing what a URL names onto this machine: each version of a file once, whoever asks.

A copy's name holds its remote name and version. What changes on the storage becomes another file
here, so nothing that a running training reads changes under it, and a fetch that was interrupted
finds what it had.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from d3etr.config.location import Url
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.progress import OnProgress, no_progress
from d3etr.storage.problems import MissingFileError, UnreachableError
from d3etr.storage.remote import CONNECTIONS, RemoteFiles, Version

logger = get_logger(__name__)

FOLDER_VARIABLE = "D3ETR_CACHE"
_PARTIAL = "partial-"


def cache_folder() -> Path:
    """Where this machine keeps copies: ``D3ETR_CACHE``, or in the user's cache folder."""
    place = os.environ.get(FOLDER_VARIABLE)
    if place:
        return Path(place).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()).absolute() / "d3etr"


@contextmanager
def local_file(location: Url | Path, on_progress: OnProgress | None = None) -> Iterator[Path]:
    """The file on this machine, fetched if it has to be; errors about it name the URL.

    Args:
        location: a path is given back as it is.
        on_progress: takes the state of the transfer.

    Raises:
        UserError: it could not be fetched, or what the block raised.
    """
    if isinstance(location, Path):
        yield location
        return
    path = fetch_file(location, on_progress)
    try:
        yield path
    except UserError as error:
        raise UserError(str(error).replace(str(path), location.shown)) from error


def fetch_file(url: Url, on_progress: OnProgress | None = None) -> Path:
    """The copy of one file.

    Raises:
        UserError: it could not be had; ``MissingFileError`` where there is none.
    """
    found = _fetch(RemoteFiles(url, single=True), [url.name], on_progress or no_progress)
    if not found:
        raise MissingFileError(f"{url.shown} does not exist: check the URL")
    return found[url.name]


def fetch_folder(
    url: Url, names: Iterable[str], on_progress: OnProgress | None = None
) -> dict[str, Path]:
    """Bring the named files of a folder here.

    Args:
        url: of the folder.
        names: relative to it; what else it holds stays where it is.
        on_progress: takes how many files are here.

    Returns:
        The copies; names that the storage does not have are left out.

    Raises:
        UserError: the storage does not answer, or refuses.
    """
    return _fetch(RemoteFiles(url), list(dict.fromkeys(names)), on_progress or no_progress)


def _fetch(remote: RemoteFiles, names: Sequence[str], on_progress: OnProgress) -> dict[str, Path]:
    url = remote.url
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", url.shown)[-60:].strip("-.")
    folder = cache_folder() / "files" / f"{slug}-{_hash(url.text)}"
    with _clear_cache_errors():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            versions = remote.versions(names, on_progress)
        except UnreachableError as error:
            copies = _newest_copies(folder, names)
            if len(copies) < len(names):
                raise
            logger.warning("%s; going on with the copy that was fetched before", error)
            return copies
        with _locked(
            folder, lambda: on_progress(f"waiting for another process that fetches {url.shown}")
        ):
            return _update(folder, remote, versions, on_progress)


def _update(
    folder: Path, remote: RemoteFiles, versions: dict[str, Version], on_progress: OnProgress
) -> dict[str, Path]:
    """Bring what is new or cut off, several files at a time; copies by name."""
    for left in folder.glob(f"{_PARTIAL}*"):  # of a process that died
        left.unlink(missing_ok=True)
    copies = {
        name: folder / f"{_hash(name)}-{_hash(repr(version))}" for name, version in versions.items()
    }
    wanted = [name for name, copy in copies.items() if not _is_whole(copy, versions[name])]
    megabytes = sum(versions[name].size or 0 for name in wanted) / 1e6
    text = f"fetching {remote.url.shown} ({megabytes:,.1f} MB)"

    def get(name: str) -> None:
        partial = folder / f"{_PARTIAL}{uuid.uuid4().hex}"
        # A file alone is counted by its megabytes, several by their number.
        remote.get(name, partial, versions[name], on_progress if len(versions) == 1 else None)
        partial.chmod(0o444)
        os.replace(partial, copies[name])

    here = len(copies) - len(wanted)
    for done, _ in enumerate(_at_once(get, wanted), start=here + 1):
        if len(versions) > 1:
            on_progress(text, done, len(copies))
    return copies


def _at_once(get: Callable[[str], None], names: Sequence[str]) -> Iterator[None]:
    """``get`` each name, several at a time; after the first failure no other one begins."""
    if len(names) == 1:  # here, so that it can be interrupted
        get(names[0])
        yield
        return
    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        for done in as_completed([pool.submit(get, name) for name in names]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _is_whole(copy: Path, version: Version) -> bool:
    try:
        return version.size in (None, copy.stat().st_size)
    except FileNotFoundError:
        return False


def _newest_copies(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """What was fetched last of each name."""
    kept = sorted(folder.glob("*-*"), key=lambda path: path.stat().st_mtime_ns)
    newest = {path.name.partition("-")[0]: path for path in kept}
    return {name: newest[_hash(name)] for name in names if _hash(name) in newest}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:20]


@contextmanager
def _clear_cache_errors() -> Iterator[None]:
    """Say what to do about a cache that cannot be written.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache {cache_folder()} cannot be used ({error.strerror or error}): set "
            f"{FOLDER_VARIABLE} to a folder that is writable and has enough space, where each "
            "machine's processes start"
        ) from error


@contextmanager
def _locked(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock among this machine's processes; it ends with the process, however that ends."""
    with open(folder / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
