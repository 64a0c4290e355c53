"""What a cache holds, and how to be rid of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from d3etr.config.location import Url
from d3etr.errors import UserError
from d3etr.storage.cache import Cache, clear_cache_errors, locked, sha256
from d3etr.storage.index import read_records


@dataclass(frozen=True)
class Entry:
    """One URL that was fetched from.

    Attributes:
        url: without credentials.
        files: how many of its files are here.
        size: bytes; content that several URLs share counts for each.
    """

    url: str
    files: int
    size: int


def entries(cache: Cache) -> list[Entry]:
    """Every URL that the cache knows, by name."""
    found = [_entry(cache, index) for index in (cache.folder / "index").glob("*.jsonl")]
    return sorted(found, key=lambda entry: entry.url)


def size(cache: Cache) -> int:
    """Bytes of all content in the cache, old versions and unfinished files included."""
    folders = (cache.folder / name for name in ("objects", "partial"))
    files = (file for folder in folders for file in folder.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def clear(cache: Cache, url: Url | None = None) -> int:
    """Remove what was fetched.

    A training that reads what was fetched would fail.

    Args:
        cache: from where.
        url: only of this one, and what no URL needs any more; None: everything.

    Returns:
        Bytes that are free now.

    Raises:
        UserError: nothing was fetched from ``url``, or a file cannot be removed.
    """
    before = size(cache)
    with clear_cache_errors(cache):
        if url is None:
            for name in ("index", "partial", "objects", "teachers"):
                if (cache.folder / name).exists():
                    shutil.rmtree(cache.folder / name)
            return before
        index = cache.index(url)
        if not index.exists():
            raise UserError(f"nothing was fetched from {url.shown}; 'd3etr cache' lists what was")
        with locked(index.with_suffix(".lock"), _wait_silently):
            index.unlink()
            cache.remove_partials(index)
        _remove_unused(cache)
    return before - size(cache)


def find_damage(cache: Cache, told: Callable[[str, int, int], None] | None = None) -> list[Path]:
    """Read all content and remove what is not what was fetched; it is fetched anew when needed.

    Args:
        cache: to look through.
        told: told how many files were read.

    Returns:
        The files that were removed.
    """
    files = [file for file in (cache.folder / "objects").glob("*/*") if file.is_file()]
    damaged = []
    for done, file in enumerate(sorted(files), start=1):
        if sha256(file) != file.name:
            file.unlink()
            damaged.append(file)
        if told is not None:
            told("reading cached files", done, len(files))
    return damaged


def _entry(cache: Cache, index: Path) -> Entry:
    url, digests = "", dict[str, str]()
    for record in read_records(index):
        url = record.get("url", url)
        if "name" in record:
            digests[record["name"]] = record["digest"]
    here = [file for file in map(cache.object, digests.values()) if file.exists()]
    return Entry(url, len(here), sum(file.stat().st_size for file in here))


def _remove_unused(cache: Cache) -> None:
    used = {
        record["digest"]
        for index in (cache.folder / "index").glob("*.jsonl")
        for record in read_records(index)
        if "digest" in record
    }
    for file in (cache.folder / "objects").glob("*/*"):
        if file.name not in used:
            file.unlink()


def _wait_silently() -> None:
    pass
