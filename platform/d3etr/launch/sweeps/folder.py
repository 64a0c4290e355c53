"""What a sweep leaves in its folder: itself, the table, the results, the best recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from d3etr.config.load import to_yaml
from d3etr.config.sweep import SweepConfig
from d3etr.config.yaml_text import dump_yaml
from d3etr.engine.find_run import find_folder
from d3etr.files import write_text
from d3etr.launch.sweeps.outcome import TrialResult, as_json, best, failures, table
from d3etr.launch.sweeps.plan import Plan

SWEEP_FILE, RESULTS_FILE, TABLE_FILE, BEST_FILE = (
    "sweep.yaml",
    "results.json",
    "table.md",
    "best.yaml",
)


def write_sweep(plan: Plan) -> None:
    """Keep the sweep, so that it can be resumed by name."""
    tree = json.loads(plan.sweep.model_dump_json(exclude_unset=True))
    write_text(plan.folder / SWEEP_FILE, dump_yaml(tree))


def write_results(plan: Plan, results: Sequence[TrialResult], command: str) -> list[Path]:
    """Write table, results and the best recipe; returns these files and the sweep's."""
    markdown, data, recipe = (plan.folder / name for name in (TABLE_FILE, RESULTS_FILE, BEST_FILE))
    write_table(plan.sweep, results, command, markdown, data)
    winner = best(results)
    if winner is not None:
        write_text(recipe, best_recipe(plan, winner))
    return [plan.folder / SWEEP_FILE, markdown, data, *([recipe] if winner is not None else [])]


def write_table(
    sweep: SweepConfig, results: Sequence[TrialResult], command: str, markdown: Path, data: Path
) -> None:
    """Write the table under its title with the command that makes it, and every trial as JSON.

    Below the table stands why trials failed.
    """
    text = f"# {sweep.title or sweep.name}\n\n`{command}`\n\n{table(sweep, results)}\n"
    failed = "".join(f"- failed: {line}\n" for line in failures(sweep, results))
    write_text(markdown, f"{text}\n{failed}" if failed else text)
    write_text(data, json.dumps(as_json(sweep, results, command), indent=1) + "\n")


def best_recipe(plan: Plan, winner: TrialResult) -> str:
    """The winner's configuration as a recipe that is ready to run."""
    config = plan.config(winner.trial)
    run = config.run.model_copy(update={"name": f"{plan.sweep.name}-best", "output": Path("runs")})
    said = f"# {winner.trial.title(plan.sweep)}: the best of sweep {plan.folder.name}\n"
    return said + to_yaml(config.model_copy(update={"run": run}))


def find_sweep(name: str, output: Path) -> Path:
    """The folder of a sweep: a path, or the beginning of its name in ``output``.

    Raises:
        UserError: none or several fit; the text lists them.
    """
    return find_folder(name, output, SWEEP_FILE, "sweep")
