"""``d3etr demo``: four runs on the embedded data, a table, and what to do next."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from d3etr.cli.command import Command, add_json, add_launcher, add_overrides, print_json
from d3etr.cli.progress import print_progress, progress_bar
from d3etr.cli.train import as_json
from d3etr.text import styled


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--teacher",
        choices=("shipped", "train"),
        default="shipped",
        help="measure the shipped teacher (default), or train one (minutes more)",
    )
    add_launcher(parser, "ray", "local")
    add_overrides(parser)
    add_json(parser)


def run_demo(options: Namespace) -> int:
    """Run it with the options of this command, or the defaults for those that are missing."""
    from rich.console import Console

    from d3etr.demo import report, runs

    train_teacher = getattr(options, "teacher", "shipped") == "train"
    with progress_bar() as progress:
        runs.prepare(train_teacher=train_teacher, overrides=options.overrides, on_progress=progress)
    done = runs.run_demo(
        train_teacher=train_teacher,
        launcher=options.launcher,
        overrides=options.overrides,
        on_progress=print_progress,
    )
    if options.json:
        print_json([{"title": run.title} | as_json(run.result) for run in done])
        return 0
    console = Console(file=styled(sys.stdout))
    console.print(report.comparison_tables(done))
    # Not through rich: it would break commands at the terminal's edge.
    print(report.next_steps(done))
    return 0


COMMAND = Command(
    "demo",
    "teacher, plain, inherited and D3ETR student on the embedded data, side by side",
    _add_arguments,
    run_demo,
)
