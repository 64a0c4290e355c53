"""``d3etr cache``: what this machine keeps of files that were fetched from URLs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from d3etr.cli.command import Command, add_json, answer


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--clear", action="store_true", help="remove all of it; not while a run reads it"
    )
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.storage.cache import megabytes, open_cache

    cache = open_cache()
    size = cache.clear() if options.clear else cache.size()
    value = {"folder": str(cache.folder), "freed_bytes" if options.clear else "bytes": size}
    text = f"{megabytes(size)} in {cache.folder} (another folder: D3ETR_CACHE)"
    answer(
        options,
        value,
        f"{megabytes(size)} removed from {cache.folder}" if options.clear else text,
    )
    return 0


COMMAND = Command(
    "cache",
    "where files that were fetched from URLs are, and how to be rid of them",
    _add_arguments,
    _run,
)
