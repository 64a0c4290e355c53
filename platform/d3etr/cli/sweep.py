"""``d3etr sweep``: many trials of one recipe, also as ``python sweeps/run.py``."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from d3etr.cli.command import (
    USER_MISTAKE,
    Command,
    add_json,
    add_overrides,
    ensure_writable,
    print_json,
)
from d3etr.cli.progress import log_progress
from d3etr.cli.train import write_data
from d3etr.errors import UserError
from d3etr.progress import no_progress

if TYPE_CHECKING:
    from d3etr.launch.sweeps.plan import Plan
    from d3etr.launch.sweeps.trials import Trial


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "sweep",
        type=Path,
        nargs="?",
        metavar="SWEEP",
        help="YAML file, or the name of a sweep that comes with d3etr, for example matching_ratios",
    )
    add_overrides(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the trials; start nothing")
    parser.add_argument(
        "--resume",
        metavar="NAME",
        help="go on with a sweep: its folder, or the beginning of its name; needs no file",
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FOLDER",
        help="also write the table there, as Markdown and JSON",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_json(parser)


def _run(options: Namespace) -> int:
    plan = _plan(options)
    if options.dry_run:
        return _dry_run(plan, options.json)
    from d3etr.launch.sweeps.driver import run_sweep
    from d3etr.launch.sweeps.results import as_json, closing_lines, table, write_table

    if options.table is not None:
        ensure_writable(options.table / f"{plan.sweep.name}.md")
    write_data(plan.config(trial) for trial in plan.examples())
    command = _command(options)
    on_progress = no_progress if options.quiet else log_progress
    result = run_sweep(plan, command=command, on_progress=on_progress)
    if options.table is not None:
        # Not with_suffix: the name may have dots.
        files = (options.table / f"{plan.sweep.name}.{suffix}" for suffix in ("md", "json"))
        write_table(plan.sweep, result.trials, command, *files)
    if options.json:
        print_json(as_json(plan.sweep, result.trials, command))
    else:
        print(table(plan.sweep, result.trials))
        for line in closing_lines(plan.sweep, result.trials):
            print(line)
        for failed in (trial for trial in result.trials if trial.state == "failed"):
            print(f"failed: {failed.trial.title(plan.sweep)}: {failed.reason}", file=sys.stderr)
        print(f"folder  {result.folder}")
    return 0 if all(trial.state in ("finished", "pruned") for trial in result.trials) else 1


def _plan(options: Namespace) -> Plan:
    from d3etr.config.sweep import load_sweep, split_overrides
    from d3etr.engine.find_run import output_of
    from d3etr.launch.sweeps.plan import SWEEP_FILE, make_plan
    from d3etr.launch.sweeps.results import find_sweep

    if options.resume is None:
        if options.sweep is None:
            raise UserError("which sweep? Give its file, for example sweeps/matching_ratios.yaml")
        return make_plan(load_sweep(options.sweep, options.overrides))
    folder = find_sweep(options.resume, output_of(options.overrides))
    own, others = split_overrides(options.overrides)
    lost = [text for text in others if text.partition("=")[0].strip() != "run.output"]
    if lost:
        raise UserError(
            f"--set {lost[0]}: the sweep {folder.name} keeps the recipe that it began with. Give "
            "the sweep's file in place of --resume to begin another with this setting"
        )
    plan = make_plan(load_sweep(folder / SWEEP_FILE, own))
    if plan.folder != folder:
        changed = f"--set {' '.join(own)} makes it another, or its" if own else "its"
        raise UserError(
            f"the sweep {folder.name} cannot be resumed: {changed} recipe has changed since, or "
            f"this is another working directory. As it is now it would be {plan.folder}"
        )
    return plan


def _dry_run(plan: Plan, as_json: bool) -> int:
    """Print the trials; a mistake of the user's where one of them could not begin."""
    trials = [
        {"number": trial.number, "trial": trial.title(plan.sweep), "run": _run_name(plan, trial)}
        for trial in plan.trials
    ]
    problems = _problems(plan)
    if as_json:
        listed = [trial | {"problem": problems.get(i)} for i, trial in enumerate(trials)]
        print_json({"folder": str(plan.folder), "trials": listed})
        return USER_MISTAKE if problems else 0
    print(f"folder  {plan.folder}")
    if plan.searched:
        search = plan.sweep.search
        print(f"{search.trials} trials, proposed by '{search.method}' from:")
        for key, domain in plan.sweep.space.items():
            print(f"  {key}: {domain.model_dump(exclude_unset=True)}")
    for i, trial in enumerate(trials):
        print(f"{trial['number']:4d}  {trial['trial']}")
        if i in problems:
            print(f"      cannot begin: {problems[i]}")
    if problems:
        print(f"{len(problems)} of {len(trials)} trials cannot begin", file=sys.stderr)
    return USER_MISTAKE if problems else 0


def _problems(plan: Plan) -> dict[int, str]:
    """Place of each planned trial that could not begin -> why; of a joined cluster, nothing."""
    from d3etr.engine.preflight import KnownSplits, judge_beginning
    from d3etr.launch.ray_environment import joined_address

    found, known = dict[int, str](), KnownSplits()
    for i, trial in enumerate(plan.trials):
        config = plan.placed(plan.config(trial))
        if joined_address(config.cluster) is None and plan.finished_twin(config) is None:
            try:
                judge_beginning(config, known)
            except UserError as error:
                found[i] = str(error)
    return found


def _run_name(plan: Plan, trial: Trial) -> str:
    from d3etr.engine.find_run import folder_of

    return folder_of(plan.config(trial)).path.name


def _command(options: Namespace) -> str:
    sets = [part for override in options.overrides for part in ("--set", override)]
    named = ["--resume", options.resume] if options.resume else [str(options.sweep)]
    return shlex.join(["python", "sweeps/run.py", *named, *sets])


COMMAND = Command("sweep", "many trials of one recipe on Ray Tune, one table", _add_arguments, _run)
