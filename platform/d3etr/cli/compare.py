"""``d3etr compare``: finished runs side by side."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from d3etr.cli.command import (
    Command,
    add_json,
    add_output_root,
    complain,
    file_to_write,
    positive,
    print_json,
    writing,
)
from d3etr.text import styled

PIPE_WIDTH = 140


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's folder, its name or the beginning of it; runs that differ in their seed only "
        "are averaged",
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
        default=6,
        metavar="N",
        help="on the page: detect on N images with every run (default 6)",
    )
    parser.add_argument(
        "--latency",
        type=Path,
        metavar="FILE",
        help="what 'd3etr benchmark RUN/weights.safetensors ... --json' printed: a column of "
        "milliseconds, one value for each network",
    )
    parser.add_argument(
        "--track",
        action="store_true",
        help="also send the latencies of --latency to the runs in MLflow, as model/latency_ms",
    )
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.tracking.compare import compare

    comparison = compare(options.runs, options.output_root, options.latency)
    if options.track:
        from d3etr.tracking.latency import track_latencies

        for sentence in track_latencies(comparison):
            complain(f"warning: {sentence}")
    if options.html is not None:
        # The detectors take seconds to import and to run: only who wants images pays.
        from d3etr.tracking.compare.page import write_page
        from d3etr.tracking.compare.pictures import look_at_pictures

        with writing(options.html):
            write_page(comparison, options.html, look_at_pictures(comparison, options.images))
    if options.json:
        print_json(comparison.to_json())
        return 0
    from rich.console import Console

    from d3etr.tracking.compare.tables import as_tables

    # A pipe has no width: rich would cut the table for 80 columns.
    console = Console(file=styled(sys.stdout), width=None if sys.stdout.isatty() else PIPE_WIDTH)
    console.print(as_tables(comparison))
    if options.html is not None:
        print(f"page: {options.html}")
    return 0


COMMAND = Command("compare", "finished runs side by side", _add_arguments, _run)
