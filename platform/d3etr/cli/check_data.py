"""``d3etr check-data``: everything that is odd or wrong with annotated images, before training."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from d3etr.cli.command import Command, add_json, add_recipe
from d3etr.cli.progress import progress_bar
from d3etr.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from d3etr.config.tree import Config
    from d3etr.data.judgement import Judgement
    from d3etr.data.splits import DetectionSplit

SPLITS = ("train", "validation", "test")
WOULD_FAIL = 1


def _add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser, optional=True)
    parser.add_argument(
        "--dataset",
        metavar="PATH",
        help="train and validation in one place: YOLO data.yaml, Pascal VOC or image folder",
    )
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
    from d3etr.data.judgement import Judgement
    from d3etr.data.splits import Keys
    from d3etr.engine.preflight import judge_recipe

    config = _config(options)

    def compare(splits: Mapping[str, DetectionSplit]) -> Judgement:
        # Without a recipe, what the tree says of training is nobody's wish.
        return judge_recipe(config, splits) if options.recipe is not None else Judgement()

    with progress_bar() as progress:
        report = check_data(
            config.data,
            progress,
            evaluation=config.evaluation,
            compare=compare,
            keys={
                name: Keys(f"--{name} IMAGES", f"--{name} ANNOTATIONS")
                for name in SPLITS
                if getattr(options, name)
            },
        )
    print(report.to_json() if options.json else report.text())
    return 0 if report.ok else WOULD_FAIL


def _config(options: Namespace) -> Config:
    from d3etr.config.load import load_config, validate

    given = {name: getattr(options, name) for name in SPLITS if getattr(options, name)}
    sources = [options.recipe, options.dataset, given or None]
    if sum(source is not None for source in sources) > 1:
        raise UserError(
            "found several of a recipe, --dataset and --train or --validation; expected one"
        )
    if options.recipe is not None:
        return load_config(options.recipe, options.overrides)
    if not given and options.dataset is None and not options.overrides:
        raise UserError(
            "nothing to check: name a recipe, or --train IMAGES ANNOTATIONS and "
            "--validation IMAGES ANNOTATIONS, or --dataset PATH"
        )
    splits: dict[str, Any] = {
        name: {"images": images, "annotations": annotations}
        for name, (images, annotations) in given.items()
    }
    if options.dataset is not None:
        splits["dataset"] = options.dataset
    # Checking needs no length of training; the tree does.
    tree = {"data": splits, "optimisation": {"steps": 1}}
    return validate(tree, "the arguments", options.overrides)


COMMAND = Command(
    "check-data",
    "report everything odd about a data set; exit code 1 when training would fail",
    _add_arguments,
    _run,
)
