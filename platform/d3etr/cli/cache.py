"""``d3etr cache``: what this machine keeps of files that were fetched from URLs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict

from d3etr.cli.command import Command, add_json, print_json
from d3etr.errors import UserError

EVERYTHING = "everything"
DAMAGED = 1


def _add_arguments(parser: ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--clear",
        metavar="URL",
        help=f"remove what was fetched from a URL ('{EVERYTHING}': all); not while a run reads it",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="read every file and remove damaged ones; exit code 1 if there were any",
    )
    add_json(parser)


def _run(options: Namespace) -> int:
    if options.clear is not None:
        return _clear(options)
    return _verify(options) if options.verify else _list(options)


def _list(options: Namespace) -> int:
    from d3etr.storage.cache import megabytes, open_cache
    from d3etr.storage.inventory import entries, size

    cache = open_cache()
    found, total = entries(cache), size(cache)
    if options.json:
        listed = [asdict(entry) for entry in found]
        print_json({"folder": str(cache.folder), "bytes": total, "urls": listed})
        return 0
    for entry in found:
        files = "1 file" if entry.files == 1 else f"{entry.files:,} files"
        print(f"{megabytes(entry.size):>12}  {files:>14}  {entry.url}")
    print(f"{megabytes(total):>12}  in {cache.folder} (another folder: D3ETR_CACHE)")
    return 0


def _clear(options: Namespace) -> int:
    from d3etr.config.location import Url, named_location
    from d3etr.storage.cache import megabytes, open_cache
    from d3etr.storage.inventory import clear

    url = None if options.clear == EVERYTHING else named_location(options.clear)
    if url is not None and not isinstance(url, Url):
        raise UserError(f"--clear {url}: expected a URL that 'd3etr cache' lists, or {EVERYTHING}")
    freed = clear(open_cache(), url)
    if options.json:
        print_json({"freed_bytes": freed})
    else:
        print(f"{megabytes(freed)} removed")
    return 0


def _verify(options: Namespace) -> int:
    from d3etr.cli.progress import progress_bar
    from d3etr.storage.cache import open_cache
    from d3etr.storage.inventory import find_damage

    with progress_bar() as progress:
        damaged = find_damage(open_cache(), progress)
    if options.json:
        print_json({"damaged": [str(file) for file in damaged]})
    else:
        print(f"{len(damaged)} damaged files")
        for file in damaged:
            print(f"  removed {file}")
    return DAMAGED if damaged else 0


COMMAND = Command("cache", "list or clear what was fetched from URLs", _add_arguments, _run)
