"""``d3etr explain``: what a configuration key does, its values, unit and default."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from d3etr.cli.command import Command, add_json, answer, writing
from d3etr.errors import UserError


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "key",
        nargs="?",
        metavar="KEY",
        help="a key such as optimisation.learning_rate, its last parts, or a section; without "
        "one, the sections",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FOLDER",
        help="write the reference of all keys there: configuration.md, and a JSON schema for "
        "editors",
    )
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.config import reference, reference_pages

    if options.write is not None:
        if options.key is not None:
            raise UserError("--write writes all keys: leave KEY out")
        with writing(options.write):
            paths = [str(path) for path in reference_pages.write_pages(options.write)]
        answer(options, {"written": paths}, "\n".join(paths))
        return 0
    keys = reference.all_keys() if options.key is None else reference.find_keys(options.key)
    whole = options.key is None
    text = reference_pages.sections_text() if whole else reference_pages.explanation(keys)
    answer(options, reference_pages.as_json(keys), text)
    return 0


COMMAND = Command(
    "explain", "what a configuration key does, its values, unit and default", _add_arguments, _run
)
