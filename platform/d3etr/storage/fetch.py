"""Bringing what a URL names onto this machine: once, whoever asks, and only what is new."""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from d3etr.config.location import Url
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.progress import OnProgress
from d3etr.storage.cache import (
    CachedFile,
    CacheEntry,
    Manifest,
    clear_cache_errors,
    locked,
    megabytes,
    open_cache,
)
from d3etr.storage.problems import MissingFileError, UnreachableError
from d3etr.storage.remote import RemoteFiles, RemoteVersion

logger = get_logger(__name__)

_MEGABYTE = 10**6


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
    path = fetch_file(location, on_progress).path
    try:
        yield path
    except UserError as error:
        raise UserError(str(error).replace(str(path), location.shown)) from error


def fetch_file(url: Url, on_progress: OnProgress | None = None) -> CachedFile:
    """Bring one file here.

    Raises:
        UserError: it could not be had; ``MissingFileError`` where there is none.
    """
    found = _fetch(RemoteFiles(url, single=True), [url.name], on_progress)
    if not found:
        raise MissingFileError(f"{url.shown} does not exist: check the URL")
    return found[url.name]


def fetch_folder(
    url: Url, names: Iterable[str], on_progress: OnProgress | None = None
) -> dict[str, CachedFile]:
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
    return _fetch(RemoteFiles(url), list(dict.fromkeys(names)), on_progress)


def _fetch(
    remote: RemoteFiles, names: Sequence[str], on_progress: OnProgress | None
) -> dict[str, CachedFile]:
    cache, url = open_cache(), remote.url

    def say_waiting() -> None:
        if on_progress is not None:
            on_progress(f"waiting for another process here that fetches {url.shown}", 0, 1)

    with clear_cache_errors(cache):
        entry = cache.entry(url)
        before = entry.manifest().checked
        with locked(entry.lock, say_waiting):
            entry.folder.mkdir(exist_ok=True)  # cleared meanwhile
            entry.remove_partials()
            known = entry.manifest()
            # While this process waited, another one may have done all there is to do.
            done = known.checked != before and known.checked.startswith(_digest_of(names))
            if done and known.has(names):
                return {name: known.files[name] for name in names}
            try:
                versions = _look_up(remote, names, on_progress)
            except UnreachableError as error:
                if not known.has(names):
                    raise
                logger.warning("%s; going on with the copy that was fetched before", error)
                return {name: known.files[name] for name in names}
            return _update(entry, known, remote, versions, on_progress)


def _look_up(
    remote: RemoteFiles, names: Sequence[str], on_progress: OnProgress | None
) -> dict[str, RemoteVersion | None]:
    found: dict[str, RemoteVersion | None] = {}
    for name, version in remote.versions(names):
        found[name] = version
        if on_progress is not None and len(names) > 1:
            on_progress(f"looking up {remote.url.shown}", len(found), len(names))
    return found


def _update(
    entry: CacheEntry,
    known: Manifest,
    remote: RemoteFiles,
    versions: Mapping[str, RemoteVersion | None],
    on_progress: OnProgress | None,
) -> dict[str, CachedFile]:
    """Bring what is new or damaged and note what there is; copies by name."""
    here, found = entry.copies(), dict[str, CachedFile]()
    wanted: dict[str, RemoteVersion] = {}
    for name, version in versions.items():
        if version is None:
            continue
        copy = here.get(version.key(name))
        if copy is not None and copy.is_intact(remote.url_of(name).shown):
            found[name] = copy
        else:
            wanted[name] = version
    _warn_of_changes(entry.url, known, wanted)
    found |= _bring(entry, remote, wanted, on_progress, len(versions))
    kept = {name: copy for name, copy in known.files.items() if name not in versions}
    complete = len(found) == len(versions)
    checked = f"{_digest_of(versions)} {uuid.uuid4().hex}" if complete else ""
    entry.write(Manifest(entry.url.shown, kept | found, checked))
    return found


def _warn_of_changes(url: Url, known: Manifest, wanted: Mapping[str, RemoteVersion]) -> None:
    changed = [
        name
        for name, version in wanted.items()
        if name in known.files and known.files[name].version != version.key(name)
    ]
    if changed:
        more = f" and {len(changed) - 1} more files" if len(changed) > 1 else ""
        text = "%s: %s%s changed since it was fetched: fetching anew"
        logger.warning(text, url.shown, changed[0], more)


def _bring(
    entry: CacheEntry,
    remote: RemoteFiles,
    wanted: Mapping[str, RemoteVersion],
    on_progress: OnProgress | None,
    asked: int,
) -> dict[str, CachedFile]:
    """Fetch files, several at a time; each is a copy as soon as it is complete."""
    needed = sum(version.size or 0 for version in wanted.values())
    if wanted:
        entry.ensure_room(needed)
    one = on_progress if asked == 1 else None
    counter = _Counter(f"fetching {entry.url.shown}, MB", needed, one)

    def get(name: str) -> CachedFile:
        partial = entry.partial()
        remote.get(name, partial, wanted[name], counter)
        return entry.adopt(partial, wanted[name].key(name))

    found: dict[str, CachedFile] = {}
    for name, copy in remote.at_once(get, list(wanted)):
        found[name] = copy
        if on_progress is not None and asked > 1:
            done = asked - len(wanted) + len(found)
            on_progress(f"fetching {entry.url.shown} ({megabytes(needed)})", done, asked)
    return found


class _Counter:
    """Adds up bytes from several threads and reports every whole megabyte."""

    def __init__(self, what: str, total: int, on_progress: OnProgress | None) -> None:
        self._what, self._total, self._on_progress = what, total, on_progress
        self._bytes, self._lock = 0, threading.Lock()

    def __call__(self, arrived: int) -> None:
        with self._lock:
            before, self._bytes = self._bytes, self._bytes + arrived
        if self._on_progress is not None and before // _MEGABYTE < self._bytes // _MEGABYTE:
            total = max(self._total, self._bytes)
            self._on_progress(self._what, self._bytes // _MEGABYTE, -(-total // _MEGABYTE))


def _digest_of(names: Iterable[str]) -> str:
    text = "\0".join(sorted(set(names)))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
