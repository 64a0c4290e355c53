"""``d3etr check-data``: everything that is odd or wrong with annotated images, before training."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from d3etr.cli.command import Command, add_json, add_recipe
from d3etr.cli.progress import progress_bar
from d3etr.errors import UserError

if TYPE_CHECKING:
    from d3etr.config.data import DataConfig

SPLITS = ("train", "validation", "test")
WOULD_FAIL = 1


def _add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser, optional=True)
    for name in SPLITS:
        parser.add_argument(
            f"--{name}",
            nargs=2,
            metavar=("IMAGES", "ANNOTATIONS"),
            help=f"folder and COCO JSON of the {name} split, instead of a recipe",
        )
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.data.checks import check_data

    with progress_bar() as progress:
        report = check_data(_data(options), progress)
    print(report.to_json() if options.json else report.text())
    return 0 if report.ok else WOULD_FAIL


def _data(options: Namespace) -> DataConfig:
    from d3etr.config.load import load_config, validate

    given = {name: getattr(options, name) for name in SPLITS if getattr(options, name)}
    if options.recipe is not None and given:
        raise UserError("found a recipe and --train or --validation; expected one of the two")
    if options.recipe is not None:
        return load_config(options.recipe, options.overrides).data
    if not given and not options.overrides:
        raise UserError(
            "nothing to check: name a recipe, or --train IMAGES ANNOTATIONS and "
            "--validation IMAGES ANNOTATIONS"
        )
    splits = {
        name: {"images": images, "annotations": annotations}
        for name, (images, annotations) in given.items()
    }
    # Checking needs no length of training; the tree does.
    tree = {"data": splits, "optimisation": {"steps": 1}}
    return validate(tree, "the arguments", options.overrides).data


COMMAND = Command(
    "check-data",
    "report everything odd about a data set; exit code 1 when training would fail",
    _add_arguments,
    _run,
)
