"""``d3etr pretrain-backbone``: give a backbone a start where ImageNet weights are out of reach."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from d3etr.cli.command import Command, add_device, add_json, add_recipe, answer
from d3etr.cli.progress import progress_bar
from d3etr.errors import UserError


def _add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser)
    add_device(parser)
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.config.load import load_config
    from d3etr.engine.pretraining import pretrain_backbone
    from d3etr.inference import usable_device

    config = load_config(options.recipe, options.overrides)
    weights = config.student.backbone_weights
    if not isinstance(weights, Path):
        raise UserError(
            f"the recipe's student.backbone_weights is {weights or 'null'}, no file: name the "
            "file to write, which training then reads, with --set student.backbone_weights=FILE"
        )
    with progress_bar() as progress:
        result = pretrain_backbone(
            config.data,
            config.student.detector.backbone,
            weights,
            config.student.pretraining,
            seed=config.run.seed,
            device=usable_device(options.device),
            on_progress=progress,
        )
    text = (
        f"{weights}: classifies {100 * result.accuracy:.1f} % of validation crops, from "
        f"{result.crops:,} crops in {result.seconds:.0f} s"
    )
    answer(options, {"output": str(weights), **result._asdict()}, text)
    return 0


COMMAND = Command(
    "pretrain-backbone",
    "train a recipe's backbone on crops of its data, in place of ImageNet weights",
    _add_arguments,
    _run,
)
