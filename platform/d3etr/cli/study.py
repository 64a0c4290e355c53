"""``d3etr study``: many recipes and seeds, one table."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from d3etr.cli.command import Command, add_json, add_overrides, positive, print_json


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("study", type=Path, metavar="STUDY", help="YAML file of rows and seeds")
    add_overrides(parser)
    parser.add_argument("--parallel", type=positive, default=1, help="runs at a time (default 1)")
    parser.add_argument(
        "--threads", type=positive, default=1, help="threads of each run (default 1)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs/results"),
        metavar="FOLDER",
        help="where the table goes, as Markdown and JSON (default docs/results)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what would be trained")
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.launch.study import cells_of, read_study, run_study, table

    study = read_study(options.study, options.overrides)
    if options.dry_run:
        for cell in cells_of(study):
            done = "done" if (cell.folder() / "summary.json").exists() else "to train"
            print(f"{cell.row}, seed {cell.seed}: {done}: {cell.folder().name}")
        return 0
    rows = run_study(
        options.study,
        options.output,
        overrides=options.overrides,
        parallel=options.parallel,
        threads=options.threads,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if options.json:
        print_json([asdict(row) for row in rows])
    else:
        print(table(study, rows))
    return 1 if any(row.failures for row in rows) else 0


COMMAND = Command("study", "train many recipes and seeds, make one table", _add_arguments, _run)
