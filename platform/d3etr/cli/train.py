"""``d3etr train``: one training run, also as ``python trainers/run.py``."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from d3etr.cli.command import Command, add_json, add_launcher, add_recipe, answer
from d3etr.errors import UserError

if TYPE_CHECKING:
    from d3etr.config.tree import Config
    from d3etr.launch.driver import RunResult


def _add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser, optional=True)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, model sizes, steps and checkpoints; start nothing",
    )
    parser.add_argument(
        "--resume",
        metavar="NAME",
        help="go on with a run: its folder, or the beginning of its name; needs no recipe",
    )
    add_launcher(parser, "ray", "local", "torchrun")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_json(parser)


def _run(options: Namespace) -> int:
    if options.recipe is None and options.resume is None and not options.overrides:
        if options.dry_run:
            raise UserError(
                "--dry-run without a recipe: the demonstration trains several. Name one, for "
                "example digits/d3etr"
            )
        from d3etr.cli.demo import run_demo

        return run_demo(options)
    config, run_dir = _resolve(options)
    if options.dry_run:
        return _dry_run(config, options)
    from d3etr.launch.api import launch

    if options.launcher != "torchrun":  # there, the first worker makes it while others wait
        write_data([config])

    result = launch(
        config,
        launcher=options.launcher,
        resume=options.resume is not None,
        run_dir=run_dir,
        quiet=options.quiet,
    )
    if options.launcher == "torchrun" and os.environ["RANK"] != "0":
        return 0  # the first worker speaks for all
    answer(options, as_json(result), lambda: _print(result))
    return 0


def _resolve(options: Namespace) -> tuple[Config, Path | None]:
    """The configuration, and the folder of a run that was asked for by name."""
    from d3etr.config.load import load_config
    from d3etr.engine.find_run import find_run, output_of, resumed_config

    if options.resume is None:
        return load_config(options.recipe, options.overrides), None
    if options.recipe is not None:
        config = load_config(options.recipe, options.overrides)
        return config, find_run(options.resume, config.run.output).path
    folder = find_run(options.resume, output_of(options.overrides))
    return resumed_config(folder, options.overrides), folder.path


def write_data(configs: Iterable[Config]) -> None:
    """Make the embedded data that is asked for and not there, with a progress bar.

    Before workers start: several at once would each make it.
    """
    wanted = {config.data.digit_scenes for config in configs} - {None}
    if wanted:
        from d3etr.cli.progress import progress_bar
        from d3etr.data.digit_scenes import write_digit_scenes

        with progress_bar() as progress:
            for scenes in wanted:
                assert scenes is not None
                write_digit_scenes(scenes, progress)


def _dry_run(config: Config, options: Namespace) -> int:
    from d3etr.dry_run import describe, describe_json
    from d3etr.launch.api import ensure_can_begin

    ensure_can_begin(config, options.launcher)
    answer(options, describe_json(config), lambda: print(describe(config, options.launcher)))
    return 0


def as_json(result: RunResult) -> dict[str, object]:
    """A run's result as plain values."""
    return {
        "run_dir": str(result.run_dir),
        "weights": str(result.weights),
        "mlflow_run": result.tracked_run,
        "trained": result.trained,
        "metrics": result.metrics,
    }


def _print(result: RunResult) -> None:
    print("finished" if result.trained else "was finished before: nothing to do")
    for name in ("mAP", "AP50", "AP75", "test/mAP", "test/AP50"):
        if name in result.metrics:
            print(f"  {name:<10}{100 * result.metrics[name]:5.1f} %")
    print(f"  folder    {result.run_dir}")
    print(f"  try it    d3etr predict {result.weights} PICTURE --output predictions")
    for mark, line in zip(("MLflow", ""), _mlflow_page(result), strict=False):
        print(f"  {mark:<10}{line}")


def _mlflow_page(result: RunResult) -> list[str]:
    """How to see the run in MLflow, if it is there."""
    from d3etr.tracking.address import how_to_open, run_page
    from d3etr.tracking.state import read_state

    state = None if result.tracked_run is None else read_state(result.run_dir)
    if state is None:
        return []
    return how_to_open(state.tracking_uri, run_page(state.experiment_id, state.run_id))


COMMAND = Command(
    "train",
    "one training run: a teacher, a plain student or a distilled student (no recipe: the demo)",
    _add_arguments,
    _run,
)
