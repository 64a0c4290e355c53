"""``d3etr compare``: finished runs side by side."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from d3etr.cli.command import Command, add_json, print_json

PIPE_WIDTH = 140


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's folder, the beginning of its name, or its name or id in MLflow; runs that "
        "differ in their seed only are averaged",
    )
    parser.add_argument(
        "--output-root",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="the folder that holds runs (default runs)",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with training curves as well"
    )
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.tracking.compare import compare

    comparison = compare(options.runs, options.output_root)
    if options.html is not None:
        from d3etr.tracking.compare_page import write_page

        write_page(comparison, options.html)
    if options.json:
        print_json(comparison.to_json())
        return 0
    from rich.console import Console

    from d3etr.tracking.compare_text import as_tables

    # A pipe has no width: rich would cut the table for 80 columns.
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(as_tables(comparison))
    if options.html is not None:
        print(f"page: {options.html}")
    return 0


COMMAND = Command("compare", "finished runs side by side", _add_arguments, _run)
