"""What detectors of others do to images: as a folder's file says it, or as they are published."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from d3etr.config.backbones import DINOV3
from d3etr.config.data import PreprocessingConfig
from d3etr.config.detector import DetectorConfig
from d3etr.config.load import validate_section
from d3etr.detectors.deimv2 import DEIMv2Config
from d3etr.detectors.imports import deimv2, grouped, lw_detr
from d3etr.errors import UserError

_ONLY_PREPROCESSING: Mapping[str, tuple[Any, ...]] = {
    "do_rescale": (True,),
    "resample": (2,),  # bilinear
}
_ONLY_NORMALISATION: Mapping[str, tuple[Any, ...]] = {
    "do_normalize": (True,),
    "image_mean": ([0.485, 0.456, 0.406],),
    "image_std": ([0.229, 0.224, 0.225],),
}


def preprocessing_of(settings: Mapping[str, Any], where: str) -> PreprocessingConfig:
    """What ``preprocessor_config.json`` does to images; the originals' 800/1333 without one.

    Image processors of RT-DETR and its kin stretch images to one height and width, and write down
    a mean and a deviation that ``do_normalize: false`` keeps them from using.

    Raises:
        UserError: something that we do not do.
    """
    require(settings, _ONLY_PREPROCESSING, where)
    factor, padded = settings.get("rescale_factor", 1 / 255), settings.get("pad_size")
    if not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise UserError(f"{where}: rescale_factor is {factor}; expected 1/255")
    if settings.get("do_pad", True) and padded not in (None, settings.get("size")):
        raise UserError(
            f"{where}: pad_size is {padded}; expected images that are padded to the largest of a "
            "batch, or stretched: detections on one image would be others here"
        )
    sides: dict[str, Any] = {}
    if settings.get("do_normalize") is False:
        sides["normalisation"] = "unit"
    else:
        require(settings, _ONLY_NORMALISATION, where)
    if settings.get("do_resize") is False:
        sides |= {"shortest_side": None, "longest_side": None}
        return validate_section(PreprocessingConfig, sides, where)
    size = settings.get("size", 800)
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": settings.get("max_size", 1333)}
    keys = {k for k, v in size.items() if v is not None} if isinstance(size, Mapping) else set()
    if keys == {"height", "width"}:
        sides["exact_size"] = [size["height"], size["width"]]
    elif keys == {"shortest_edge", "longest_edge"}:
        sides |= {"shortest_side": size["shortest_edge"], "longest_side": size["longest_edge"]}
    else:
        raise UserError(
            f"{where}: size is {size}; expected shortest_edge and longest_edge, or height and "
            "width. Take the file out of the folder to import the model with the usual 800 and 1333"
        )
    return validate_section(PreprocessingConfig, sides, where)


def published_preprocessing(
    config: DetectorConfig, usual: PreprocessingConfig
) -> PreprocessingConfig:
    """What is done to images where a folder does not say it, as the detector was published.

    Args:
        config: of the detector.
        usual: of its kind.
    """
    normalisation, side = usual.normalisation, None
    if config.name == "rf_detr":
        vit = config.backbone.vit
        side = grouped.published_side(vit.patch, vit.positions)
    elif config.name == "lw_detr":
        side = lw_detr.SIDE
    elif isinstance(config, DEIMv2Config):
        _, side, _ = deimv2.published(config.encoder_width if config.encoder == "lite" else 0)
        normalisation = "imagenet" if config.backbone.name == DINOV3 else normalisation
    if side is None:
        return usual
    return PreprocessingConfig(
        normalisation=normalisation,
        shortest_side=None,
        longest_side=None,
        exact_size=(side, side),
    )


def in_words(pixels: PreprocessingConfig) -> str:
    """Sizes and normalisation, in a note."""
    size = (
        f"{pixels.shortest_side} pixels on the shorter side, at most {pixels.longest_side} on the "
        "longer"
        if pixels.exact_size is None
        else f"{pixels.exact_size[1]} x {pixels.exact_size[0]} pixels"
    )
    return f"{size}, normalisation '{pixels.normalisation}'"


def require(
    settings: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]], where: str
) -> None:
    """Make sure that settings, where they are said, have values that are ours.

    Args:
        settings: of a file.
        expected: values by key.
        where: for error texts.

    Raises:
        UserError: lists those that have others.
    """
    wrong = [
        f"{key} is {settings[key]!r}, expected {' or '.join(map(repr, values))}"
        for key, values in expected.items()
        if key in settings and settings[key] not in values
    ]
    if wrong:
        raise UserError(
            f"{where}: {'; '.join(wrong)}. The same tensors would detect something else here: "
            "this variant cannot be imported"
        )
