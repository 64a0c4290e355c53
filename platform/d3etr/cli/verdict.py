"""``d3etr verdict``: is distilling worth it for this student, these data, these hours?"""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from d3etr.cli.command import (
    Command,
    above_zero,
    add_json,
    add_recipe,
    location,
    print_json,
    whole_number,
)
from d3etr.cli.progress import print_progress
from d3etr.errors import UserError
from d3etr.progress import no_progress
from d3etr.text import printable, styled

RATES = (0.33, 1.0)
WIDTH = 150


def _add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--minutes",
        type=above_zero,
        required=True,
        metavar="M",
        help="of training steps in each run: GPU time, without a GPU CPU time",
    )
    parser.add_argument(
        "--seeds",
        type=whole_number(2),
        default=3,
        metavar="N",
        help="runs of each contender (default 3)",
    )
    parser.add_argument(
        "--rates",
        type=above_zero,
        nargs="+",
        default=list(RATES),
        metavar="FACTOR",
        help="factors on the recipe's learning rate; each contender takes the one that is best on "
        "validation in short runs (default 0.33 1); with one there are no short runs",
    )
    parser.add_argument(
        "--early",
        action="store_true",
        help="all contenders and seeds at a quarter of the time first; what cannot win is stopped",
    )
    parser.add_argument(
        "--checkpoint",
        type=location,
        metavar="FILE",
        help="the student's own pre-trained weights: fine-tuned, it is one more rival",
    )
    parser.add_argument(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="one more distilled student: the recipe with other values",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.verdict.report import as_json, track, write_files
    from d3etr.verdict.run import Question, run_verdict

    question = Question(
        options.recipe,
        tuple(options.overrides),
        options.minutes,
        options.seeds,
        tuple(dict.fromkeys(options.rates)),
        options.early,
        options.checkpoint,
        _variants(options.variant),
        _command(options),
    )
    found = run_verdict(question, no_progress if options.quiet else print_progress)
    files = write_files(found)
    config = found.stage.ran[-1].entry.way.config
    opened = track(found, config, files) if config.tracking.enabled else []
    if options.json:
        print_json(as_json(found))
        return 0
    from rich.console import Console

    from d3etr.verdict.report import classes_table, notes, results_table

    print(printable(found.sentence))
    console = Console(file=styled(sys.stdout), width=None if sys.stdout.isatty() else WIDTH)
    for table in (results_table(found), classes_table(found)):
        if table.rows:
            console.print(table.as_rich())
    print()
    for line in [*notes(found), *opened, f"folder  {found.folder}"]:
        print(printable(line))
    return 0


def _variants(given: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Name -> overrides."""
    found = dict[str, tuple[str, ...]]()
    for name, *overrides in given:
        if name in found or not overrides or "=" in name:
            raise UserError(
                f"--variant {' '.join([name, *overrides])}: expected a name that no other variant "
                "has, and what it changes, such as: --variant predictions "
                "distillation.self_attention.weight=0 distillation.cross_attention.weight=0"
            )
        found[name] = tuple(overrides)
    return found


def _command(options: Namespace) -> str:
    parts = ["d3etr", "verdict", str(options.recipe), "--minutes", _exact(options.minutes)]
    parts += ["--seeds", str(options.seeds), "--rates", *map(_exact, options.rates)]
    parts += ["--early"] if options.early else []
    parts += ["--checkpoint", str(options.checkpoint)] if options.checkpoint else []
    parts += [part for variant in options.variant for part in ("--variant", *variant)]
    parts += [part for override in options.overrides for part in ("--set", override)]
    return shlex.join(parts)


def _exact(number: float) -> str:
    """With every digit: a verdict is found again by what was asked."""
    return repr(number).removesuffix(".0")


COMMAND = Command(
    "verdict", "plain and distilled students at equal time: is it worth it?", _add_arguments, _run
)
