"""``d3etr pretrain-backbone``: give a backbone a start where ImageNet weights are out of reach."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from d3etr.cli.command import Command, add_device, add_json, add_recipe, answer
from d3etr.cli.progress import progress_bar
from d3etr.errors import UserError

if TYPE_CHECKING:
    from d3etr.config.tree import Config


def _add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser)
    add_device(parser)
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.config.load import load_config
    from d3etr.engine.pretraining import pretrain_backbone
    from d3etr.inference import usable_device

    config = load_config(options.recipe, options.overrides)
    with progress_bar() as progress:
        result = pretrain_backbone(
            config.data,
            config.student.detector.backbone,
            _place(config),
            config.student.pretraining,
            seed=config.run.seed,
            device=usable_device(options.device),
            on_progress=progress,
        )
    value = {
        "output": str(result.path),
        "accuracy": result.accuracy,
        "accuracy_on_objects": result.objects,
        "crops": result.crops,
        "seconds": result.seconds,
    }
    text = (
        f"{result.path}: classifies {100 * result.accuracy:.1f} % of validation crops "
        f"({100 * result.objects:.1f} % of objects), from {result.crops:,} crops in "
        f"{result.seconds:.0f} s"
    )
    answer(options, value, text)
    return 0


def _place(config: Config) -> Path:
    weights = config.student.backbone_weights
    if not isinstance(weights, Path):
        raise UserError(
            f"the recipe's student.backbone_weights is {weights or 'null'}, no file: say where "
            "to write it, and where training finds it, with --set student.backbone_weights=FILE"
        )
    return weights


COMMAND = Command(
    "pretrain-backbone",
    "train a recipe's backbone on crops of its data, in place of ImageNet weights",
    _add_arguments,
    _run,
)
