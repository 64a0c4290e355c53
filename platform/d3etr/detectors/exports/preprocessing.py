"""What images go through, as ``preprocessor_config.json`` has it."""

from __future__ import annotations

from typing import Any

from d3etr.config.data import PreprocessingConfig
from d3etr.detectors.torchvision_weights import MEAN, STD

_ANY_SIDE = 65_536
"""Longest side of an image, where nothing bounds it: their setting needs a number."""


def describe_preprocessing(config: PreprocessingConfig) -> dict[str, Any]:
    """Settings of any of their detectors' image processors.

    Args:
        config: one without ``problems_of_preprocessing``.
    """
    # Said in any case: RT-DETR's processor does not normalise unless it is told to, others do.
    pixels: dict[str, Any] = {"do_normalize": config.normalisation != "unit"}
    pixels |= {"image_mean": list(MEAN), "image_std": list(STD)}
    if config.exact_size is not None:
        height, width = config.exact_size
        return {**pixels, "size": {"height": height, "width": width}}
    if config.shortest_side is None:
        return {**pixels, "do_resize": False}
    longest = config.longest_side or _ANY_SIDE
    return {**pixels, "size": {"shortest_edge": config.shortest_side, "longest_edge": longest}}


def problems_of_preprocessing(config: PreprocessingConfig, multiple: int) -> list[str]:
    """What transformers has no setting for, and what to do about it.

    Args:
        config: of the detector.
        multiple: what both sides of an image have to be a multiple of for theirs to run.
    """
    problems = []
    if config.normalisation == "per_image":
        problems.append(
            "its preprocessing normalises 'per_image', theirs by fixed numbers: train one with "
            "data.preprocessing.normalisation 'imagenet' or 'unit'"
        )
    if config.exact_size is not None and any(side % multiple for side in config.exact_size):
        height, width = config.exact_size
        problems.append(
            f"its exact_size is {height} x {width}, and theirs takes multiples of {multiple} only: "
            "train on with such a data.preprocessing.exact_size"
        )
    if (
        config.exact_size is None
        and config.shortest_side is None
        and config.longest_side is not None
    ):
        problems.append(
            f"its preprocessing bounds the longest side ({config.longest_side}) without a shortest "
            "one: set data.preprocessing.shortest_side"
        )
    return problems
