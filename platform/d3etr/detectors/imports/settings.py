"""What checkpoints' ``args`` and ``config.json`` say that tensors do not show.

Settings that would make another detector of the same tensors are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from d3etr.config.data import PreprocessingConfig
from d3etr.config.load import validate_section
from d3etr.detectors.imports.architecture import (
    HUGGING_FACES_EPSILON,
    OFFICIAL_EPSILON,
    Unseen,
)
from d3etr.errors import UserError

MODEL_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "detr": "detr",
        "conditional_detr": "conditional_detr",
        "dab-detr": "dab_detr",
        "deformable_detr": "deformable_detr",
    }
)
"""Hugging Face's ``model_type`` and our name."""

_EXPECTED_ARGS: Mapping[str, tuple[Any, ...]] = {
    "masks": (False,),
    "pre_norm": (False,),
    "position_embedding": ("sine", "v2"),
    "position_embedding_scale": (2 * math.pi,),
    "num_patterns": (0,),
    "transformer_activation": ("prelu",),
}
_EXPECTED_CONFIG: Mapping[str, tuple[Any, ...]] = {
    "position_embedding_type": ("sine",),
    "query_dim": (4,),
    "keep_query_pos": (False,),
    "num_patterns": (0,),
    "normalize_before": (False,),
    "sine_position_embedding_scale": (None, 2 * math.pi),
    "num_channels": (3,),
}
_EXPECTED_RESNET: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("resnet", "timm_backbone"),
    "hidden_act": ("relu",),
    "downsample_in_first_stage": (False,),
    "downsample_in_bottleneck": (False,),
}
_BILINEAR = 2
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def from_args(args: Mapping[str, Any], where: str) -> Unseen:
    """What the official training code was called with.

    Args:
        args: of a checkpoint; may be empty.
        where: for error texts.

    Raises:
        UserError: settings of a detector that is not ours.
    """
    _require(args, _EXPECTED_ARGS, f"{where}: args")
    temperature = _equal(args, "pe_temperatureH", "pe_temperatureW", where)
    _equal(args, "enc_n_points", "dec_n_points", where)
    return _unseen(
        where,
        heads=args.get("nheads"),
        dilation=args.get("dilation"),
        dropout=args.get("dropout"),
        proposals=args.get("num_queries"),
        temperature=temperature,
        epsilon=OFFICIAL_EPSILON,
    )


def from_config(config: Mapping[str, Any], where: str) -> tuple[str, Unseen]:
    """Our name of a Hugging Face model, and what its tensors do not show.

    Args:
        config: of ``config.json``.
        where: for error texts.

    Raises:
        UserError: a model that is not ours.
    """
    kind = str(config.get("model_type"))
    if kind not in MODEL_TYPES:
        raise UserError(f"{where}: model_type is {kind}; expected one of {', '.join(MODEL_TYPES)}")
    architectures = config.get("architectures") or ["ForObjectDetection"]
    if not any(str(name).endswith("ForObjectDetection") for name in architectures):
        raise UserError(
            f"{where}: architectures is {architectures}: expected a ...ForObjectDetection; "
            "masks and models without heads cannot be imported"
        )
    name = MODEL_TYPES[kind]
    activation = ("prelu",) if name == "dab_detr" else ("relu",)
    _require(config, {**_EXPECTED_CONFIG, "activation_function": activation}, where)
    _equal(config, "encoder_n_points", "decoder_n_points", where)
    return name, _unseen(
        where,
        heads=_equal(config, "encoder_attention_heads", "decoder_attention_heads", where) or 8,
        dilation=_dilation(config, where),
        dropout=config.get("dropout"),
        proposals=config.get("two_stage_num_proposals"),
        temperature=_equal(config, "temperature_height", "temperature_width", where) or 20,
        epsilon=HUGGING_FACES_EPSILON,
    )


def _unseen(where: str, **values: Any) -> Unseen:
    try:
        return Unseen(**values)
    except ValidationError as error:
        problems = (f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
        raise UserError(f"{where}: broken settings: {'; '.join(problems)}") from error


def _dilation(config: Mapping[str, Any], where: str) -> bool:
    """Their own ResNet has no dilation; timm's has, by one of three keys."""
    backbone = config.get("backbone_config") or {}
    _require(backbone, _EXPECTED_RESNET, f"{where}: backbone_config")
    if backbone.get("model_type") == "resnet":
        return False
    strides = (backbone, config.get("backbone_kwargs") or {})
    return bool(config.get("dilation")) or any(s.get("output_stride") == 16 for s in strides)


def preprocessing_of(settings: Mapping[str, Any], where: str) -> PreprocessingConfig:
    """What ``preprocessor_config.json`` does to images; the originals' 800/1333 without one.

    Raises:
        UserError: something that we do not do.
    """
    expected = {"do_normalize": (True,), "do_rescale": (True,), "resample": (_BILINEAR,)}
    _require(settings, {**expected, **{k: (v,) for k, v in _IMAGENET.items()}}, where)
    if settings.get("do_resize") is False:
        return PreprocessingConfig(shortest_side=None, longest_side=None)
    size = settings.get("size", 800)
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": settings.get("max_size", 1333)}
    if not isinstance(size, Mapping) or set(size) != {"shortest_edge", "longest_edge"}:
        raise UserError(
            f"{where}: size is {size}; expected shortest_edge and longest_edge. Take the file out "
            "of the folder to import the model with the usual 800 and 1333"
        )
    sides = {"shortest_side": size["shortest_edge"], "longest_side": size["longest_edge"]}
    return validate_section(PreprocessingConfig, sides, where)


def _require(
    settings: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]], where: str
) -> None:
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


def _equal(settings: Mapping[str, Any], one: str, other: str, where: str) -> Any:
    """The value of two keys that have to agree, or None."""
    if settings.get(one) != settings.get(other):
        raise UserError(
            f"{where}: {one} is {settings.get(one)} and {other} is {settings.get(other)}: "
            "expected the same number; this variant cannot be imported"
        )
    return settings.get(one)
