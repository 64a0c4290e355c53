"""``d3etr compare``: finished runs side by side."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from d3etr.cli.command import (
    Command,
    add_json,
    add_output_root,
    file_to_write,
    positive,
    print_json,
    writing,
)
from d3etr.text import styled

if TYPE_CHECKING:
    from d3etr.tracking.compare import Comparison
    from d3etr.tracking.compare.pictures import Pictures

PIPE_WIDTH = 140
IMAGES_ON_PAGE = 6


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's folder, the beginning of its name, or its name or id in MLflow; runs that "
        "differ in their seed only are averaged",
    )
    add_output_root(parser)
    parser.add_argument(
        "--html",
        type=file_to_write(".html", ".htm"),
        metavar="FILE",
        help="also write everything, with curves and images, as one page that needs nothing else",
    )
    parser.add_argument(
        "--images",
        type=positive,
        metavar="N",
        help="detect on N images with every run; text and JSON then name what was found "
        f"(default {IMAGES_ON_PAGE} with --html, else none)",
    )
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.tracking.compare import compare

    comparison = compare(options.runs, options.output_root)
    pictures = _pictures(comparison, options)
    if options.html is not None:
        from d3etr.tracking.compare.page import write_page

        with writing(options.html):
            write_page(comparison, options.html, pictures)
    # The page shows images without being asked; a terminal does not.
    shown = pictures if options.images is not None else None
    if options.json:
        found = comparison.to_json()
        print_json(found if shown is None else found | {"pictures": shown.as_json()})
        return 0
    from rich.console import Console

    from d3etr.tracking.compare.text import as_tables

    # A pipe has no width: rich would cut the table for 80 columns.
    console = Console(file=styled(sys.stdout), width=None if sys.stdout.isatty() else PIPE_WIDTH)
    console.print(as_tables(comparison, pictures=shown))
    if options.html is not None:
        print(f"page: {options.html}")
    return 0


def _pictures(comparison: Comparison, options: Namespace) -> Pictures | None:
    if options.images is None and options.html is None:
        return None
    # The detectors take seconds to import and to run: only who wants images pays.
    from d3etr.tracking.compare.pictures import look_at_pictures

    return look_at_pictures(comparison, options.images or IMAGES_ON_PAGE)


COMMAND = Command("compare", "finished runs side by side", _add_arguments, _run)
