"""Annotated images that a command's arguments name."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from d3etr.errors import UserError

if TYPE_CHECKING:
    from d3etr.config.data import SplitConfig
    from d3etr.data.splits import DetectionSplit
    from d3etr.progress import OnProgress


def split_config(options: Namespace, given: Sequence[str]) -> SplitConfig:
    """Where the images are.

    Args:
        options: of the command.
        given: arguments that it has, as the keys of ``SplitConfig`` are called.

    Raises:
        UserError: they contradict each other, or one is missing.
    """
    from d3etr.config.data import SplitConfig
    from d3etr.config.load import validate_section
    from d3etr.config.problems import ConfigError

    texts = {name: getattr(options, name) for name in given}
    tree = {k: v if v is None or isinstance(v, bool) else str(v) for k, v in texts.items()}
    try:
        return validate_section(SplitConfig, tree, "the arguments")
    except ConfigError as error:
        raise UserError("; ".join(f"--{problem}" for problem in error.problems)) from error


def evaluated_split(
    options: Namespace, given: Sequence[str], learnt: Sequence[str], progress: OnProgress
) -> DetectionSplit:
    """The images to measure on, whose classes are those that the detector learnt.

    Args:
        options: of the command.
        given: as of ``split_config``.
        learnt: names of the detector's classes.
        progress: told of what is fetched.

    Raises:
        UserError: the split cannot be used, or has other classes.
    """
    from d3etr.data.splits import Keys, read_split

    keys = Keys("--images", "--annotations")
    split = read_split("validation", split_config(options, given), progress, keys=keys)
    annotated = [category.name for category in split.categories]
    if [*learnt] != annotated:
        raise UserError(
            f"{options.weights} detects {', '.join(learnt)}; {options.annotations} annotates "
            f"{', '.join(annotated)}. Expected the same categories in the same order"
        )
    return split
