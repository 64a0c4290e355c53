"""``d3etr store-views``: the teacher's outputs for a recipe's views, before it is trained."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from d3etr.cli.command import Command, add_json, add_launcher, add_recipe, answer


def _add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser)
    add_launcher(parser, "local", "ray")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.cli.train import write_data
    from d3etr.config.load import load_config
    from d3etr.launch.store_views import store_views

    config = load_config(options.recipe, options.overrides)
    write_data([config])
    found = store_views(config, options.launcher, quiet=options.quiet)
    lines = [
        f"views: {store['views']:,} of {store['images']:,} images, "
        f"{store['bytes'] / 1e6:,.1f} MB, in {store['folder']}"
        for store in found["stores"]
    ]
    answer(options, found, "\n".join([*lines, f"{found['seconds']:.0f} s"]))
    return 0


COMMAND = Command(
    "store-views",
    "store the teacher's outputs for a recipe's teacher.views, which training does by itself too",
    _add_arguments,
    _run,
)
