"""Bringing what a URL names into this machine's cache: once, whoever asks, and only what is new."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from d3etr.config.location import Url
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.storage.cache import Cache, clear_cache_errors, locked, megabytes, open_cache
from d3etr.storage.index import Index, Known
from d3etr.storage.problems import MissingFileError, UnreachableError
from d3etr.storage.remote import Remote, Stamp

logger = get_logger(__name__)

Tell: TypeAlias = Callable[[str, int, int], None]
"""Takes what is being done, how much of it is done, and how much there is."""
_MEGABYTE = 10**6


@dataclass(frozen=True)
class Fetched:
    """Files in the cache.

    Attributes:
        cache: where they are.
        known: name -> what is known of it; those that the storage lacks are not there.
    """

    cache: Cache
    known: Mapping[str, Known]

    def path(self, name: str) -> Path:
        """The copy of a file.

        Raises:
            KeyError: the storage lacks it.
        """
        return self.cache.object(self.known[name].digest)


@contextmanager
def local_file(location: Url | Path, tell: Tell | None = None) -> Iterator[Path]:
    """The file on this machine, fetched if it has to be; errors about it name the URL.

    Args:
        location: a path is given back as it is.
        tell: told of the fetching.

    Raises:
        UserError: it could not be fetched, or what the block raised.
    """
    if isinstance(location, Path):
        yield location
        return
    path = fetch_file(location, tell).path(location.name)
    try:
        yield path
    except UserError as error:
        raise UserError(str(error).replace(str(path), location.shown)) from error


def fetch_file(url: Url, tell: Tell | None = None) -> Fetched:
    """Bring one file here; its name is the URL's last part.

    Raises:
        UserError: it could not be had; ``MissingFileError`` where there is none.
    """
    fetched = _fetch(url, [url.name], tell, single=True)
    if url.name not in fetched.known:
        raise MissingFileError(f"{url.shown} does not exist: check the URL")
    return fetched


def fetch_folder(url: Url, names: Iterable[str], tell: Tell | None = None) -> Fetched:
    """Bring the named files of a folder here.

    Args:
        url: of the folder.
        names: relative to it; what else it holds stays where it is.
        tell: told how many files are here.

    Returns:
        The copies; names that the storage does not have are left out.

    Raises:
        UserError: the storage does not answer, or refuses.
    """
    return _fetch(url, list(dict.fromkeys(names)), tell, single=False)


def _fetch(url: Url, names: Sequence[str], tell: Tell | None, *, single: bool) -> Fetched:
    cache = open_cache()
    with clear_cache_errors(cache):
        cache.make()
        checked = Index(cache, url).checked_at(names)
        lock = cache.index(url).with_suffix(".lock")
        with locked(lock, lambda: _say_waiting(url, tell)):
            index = Index(cache, url)
            cache.remove_partials(index.file)
            # While this process waited, another one may have done all there is to do.
            done = index.checked_at(names) != checked
            if not (done and all(index.intact(name) for name in names)):
                names = _update(index, names, tell, single=single)
    return Fetched(cache, {name: index.known[name] for name in names})


def _say_waiting(url: Url, tell: Tell | None) -> None:
    if tell is not None:
        tell(f"waiting for another process here that fetches {url.shown}", 0, 1)


def _update(index: Index, names: Sequence[str], tell: Tell | None, *, single: bool) -> list[str]:
    """Make the cache what the storage is; returns the names that the storage has."""
    try:
        remote = Remote(index.url, single=single)
        stamps = _look(remote, names, tell)
    except UnreachableError as error:
        if not all(index.intact(name) for name in names):
            raise
        logger.warning("%s; going on with the copy that was fetched before", error)
        return list(names)
    there = {name: stamp for name, stamp in stamps.items() if stamp is not None}
    wanted = [name for name, stamp in there.items() if not _current(index, name, stamp)]
    if wanted:
        _say_changed(index, wanted)
        _bring(index, remote, {name: there[name] for name in wanted}, tell, len(names))
    if len(there) == len(names):
        index.note_check(names)
    return list(there)


def _look(remote: Remote, names: Sequence[str], tell: Tell | None) -> dict[str, Stamp | None]:
    found: dict[str, Stamp | None] = {}
    for name, stamp in remote.stamps(names):
        found[name] = stamp
        if tell is not None and len(names) > 1:
            tell(f"looking up {remote.url.shown}", len(found), len(names))
    return found


def _current(index: Index, name: str, stamp: Stamp) -> bool:
    known = index.known.get(name)
    return known is not None and known.stamp == stamp and index.intact(name)


def _say_changed(index: Index, wanted: Sequence[str]) -> None:
    changed = [name for name in wanted if name in index.known and index.intact(name)]
    if changed:
        more = f" and {len(changed) - 1} more files" if len(changed) > 1 else ""
        logger.warning(
            "%s: %s%s changed since it was fetched: fetching anew",
            index.url.shown,
            changed[0],
            more,
        )


def _bring(
    index: Index, remote: Remote, stamps: Mapping[str, Stamp], tell: Tell | None, asked: int
) -> None:
    """Fetch files; each is noted as soon as it is complete."""
    needed = sum(stamp.size or 0 for stamp in stamps.values())
    index.cache.ensure_room(needed, index.url)
    counter = _Counter(f"fetching {index.url.shown}, MB", needed, tell if asked == 1 else None)
    targets = {name: (index.cache.partial(index.file), stamp) for name, stamp in stamps.items()}
    done = asked - len(stamps)
    for name, (digest, seal) in remote.fetch(targets, index.cache.adopt, counter):
        index.add(name, Known(stamps[name], digest, seal))
        done += 1
        if tell is not None and asked > 1:
            tell(f"fetching {index.url.shown} ({megabytes(needed)})", done, asked)


class _Counter:
    """Adds up bytes from several threads and tells of every whole megabyte."""

    def __init__(self, what: str, total: int, tell: Tell | None) -> None:
        self._what, self._total, self._tell = what, total, tell
        self._bytes, self._lock = 0, threading.Lock()

    def __call__(self, arrived: int) -> None:
        with self._lock:
            before, self._bytes = self._bytes, self._bytes + arrived
        if self._tell is not None and before // _MEGABYTE < self._bytes // _MEGABYTE:
            total = max(self._total, self._bytes)
            self._tell(self._what, self._bytes // _MEGABYTE, -(-total // _MEGABYTE))
