"""``d3etr register``: a finished run's student as a model of MLflow's registry."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from d3etr.cli.command import Command, add_json, add_output_root, answer


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or the beginning of its name")
    parser.add_argument("name", metavar="NAME", help="of the registered model, new or known")
    add_output_root(parser)
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.engine.find_run import find_run
    from d3etr.tracking.runs import register_run

    folder = find_run(options.run, options.output_root)
    found = register_run(folder.path, options.name)
    value = {"run": str(folder.path), "model": found.address, "standing": found.standing}
    answer(options, value, f"{found.address}: {found.standing}")
    return 0


COMMAND = Command(
    "register", "register a run's student in MLflow; the best is its champion", _add_arguments, _run
)
