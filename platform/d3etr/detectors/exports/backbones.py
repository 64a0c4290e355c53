"""Backbones as transformers' ``backbone_config`` has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from d3etr.config.backbone import BackboneConfig
from d3etr.config.backbones import DINOV3, RESNET_VD, TIMM
from d3etr.config.dinov3 import DINOv3Config
from d3etr.detectors.imports import dinov3, hgnet
from d3etr.detectors.imports.settings import RESNETS

WIDTHS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"basic": (64, 128, 256, 512), "bottleneck": (256, 512, 1024, 2048)}
)
"""Channels of a ResNet's four stages."""
_STAGES = 4
_PLAIN = {name: network for network, name in RESNETS.items()}
_VD = {f"{name}vd": x for name, x in _PLAIN.items() if f"{name}vd" in RESNET_VD}
"""ResNet-vd: (kind of block, blocks per stage) by name. transformers has them as RT-DETR's."""
_RESNETS = _PLAIN | _VD
_HGNET = re.compile(rf"{TIMM}hgnetv2_(b[0-6]|atto|femto|pico)(\..*)?")
"""HGNetV2 by our name, maybe with the name of timm's weights; the group is its size."""
_STAGE_KEYS = (
    *("in_channels", "mid_channels", "out_channels", "num_blocks"),
    *("downsample", "light_block", "kernel_size", "numb_of_layers"),
)
"""Of their HGNetV2, with the prefix ``stage_``, in the order of timm's tables."""


def describe_backbone(config: BackboneConfig, stages: int) -> dict[str, Any]:
    """Their backbone, which gives the maps of the last ``stages`` stages.

    Args:
        config: one without ``problems_of_backbone``.
        stages: 1 to 4.
    """
    if config.name == DINOV3:
        return _describe_dinov3(config.dinov3)
    first = _STAGES + 1 - stages
    if config.dilation:  # their own ResNet has none
        return {
            "model_type": "timm_backbone",
            "backbone": config.name,
            "use_pretrained_backbone": False,
            "out_indices": [*range(first, _STAGES + 1)],
            "output_stride": 16,
        }
    maps = {"out_features": [f"stage{stage}" for stage in range(first, _STAGES + 1)]}
    if (match := _HGNET.fullmatch(config.name)) is not None:
        return _hgnet(match[1], stages)
    block, depths = _RESNETS[config.name]
    return {
        "model_type": "rt_detr_resnet" if config.name in _VD else "resnet",
        "layer_type": block,
        "depths": list(depths),
        "hidden_sizes": list(WIDTHS[block]),
        "embedding_size": 64,
        **maps,
    }


def _hgnet(size: str, stages: int) -> dict[str, Any]:
    """Sizes as timm's network, which the detector is over, has them; maps of the last stages."""
    from timm.models.hgnet import model_cfgs  # importing timm takes two seconds

    from d3etr.detectors.small_hgnet import SMALL_SIZES

    sizes: Mapping[str, Any] = SMALL_SIZES.get(size) or model_cfgs[f"hgnetv2_{size}"]
    count = sum(f"stage{stage}" in sizes for stage in range(1, _STAGES + 1))
    rows = [sizes[f"stage{stage}"] for stage in range(1, count + 1)]
    columns = dict(zip(_STAGE_KEYS, map(list, zip(*rows, strict=True)), strict=True))
    stem = list(sizes["stem_chs"])
    return {
        "model_type": "hgnet_v2",
        "stem_channels": [3, *stem],
        "embedding_size": stem[-1],
        "hidden_sizes": columns["out_channels"],
        "depths": columns["num_blocks"],
        **{f"stage_{key}": values for key, values in columns.items()},
        "use_learnable_affine_block": stem[0] in hgnet.AFFINE,
        "out_features": [f"stage{stage}" for stage in range(count + 1 - stages, count + 1)],
    }


def problems_of_backbone(config: BackboneConfig) -> list[str]:
    """What transformers has no setting for, and what to do about it."""
    if _HGNET.fullmatch(config.name) is None and config.name not in _RESNETS:
        names = (*_RESNETS, f"{TIMM}hgnetv2_b0 to b6")
        return [
            f"the backbone is '{config.name}', and only these are its: {', '.join(names)}; "
            "distil into a detector over one of them"
        ]
    problems = []
    if config.norm == "group":
        problems.append(
            "the backbone has GroupNorm, theirs batch norm: train one with student.detector."
            "backbone.norm 'frozen'"
        )
    if config.dilation and (config.name in _VD or _RESNETS[config.name][0] == "basic"):
        problems.append(
            f"a dilated '{config.name}' is not what theirs is: train one with "
            "student.detector.backbone.dilation false, or over resnet50"
        )
    return problems


def _describe_dinov3(config: DINOv3Config) -> dict[str, Any]:
    """Of a DEIMv2 over it."""
    gated = config.feedforward.endswith("_gated")
    return {
        "model_type": dinov3.MODEL,
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.blocks,
        "num_attention_heads": config.heads,
        "hidden_act": config.feedforward.removesuffix("_gated"),
        "use_gated_mlp": gated,
        "num_register_tokens": config.registers,
        "key_bias": config.key_bias,
        "layerscale_value": config.first_scale,
        "layer_norm_eps": config.epsilon,
        "apply_layernorm": config.normed == "all",
        "pos_embed_rescale": None,
        "out_indices": list(config.outputs),
    }
