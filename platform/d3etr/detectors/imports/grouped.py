"""Tensors of LW-DETR and RF-DETR by others' names, and their architecture from them.

Names are those of transformers (``lw_detr``, ``rf_detr``) in memory and in files, and of RF-DETR's
official code, which the files of ``rf_detr`` share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from d3etr.config.data import PreprocessingConfig

SIGN = "backbone.0.encoder.encoder.embeddings.cls_token"
"""As of ``layouts.Layout``, of RF-DETR."""
_BLOCK = r"^(backbone\.blocks\.\d+)\."
_STAGE = r"^encoder\.(?:stages|scale_layers)\.(\d+)\."
_LEVEL = r"^(encoder\.levels\.\d+)\."
RULES: tuple[tuple[str, str], ...] = (
    (r"^backbone\.(0\.encoder\.encoder|backbone)\.", "backbone."),
    (r"^backbone\.(0\.)?projector\.", "encoder."),
    (r"^backbone\.embeddings\.cls_token$", "backbone.class_token"),
    (r"^backbone\.embeddings\.position_embeddings$", "backbone.positions"),
    (r"^backbone\.embeddings\.(patch_embeddings\.)?projection\.", "backbone.patches."),
    (r"^backbone\.layernorm\.", "backbone.norm."),
    (r"^backbone\.encoder\.layer\.(\d+)\.", r"backbone.blocks.\1."),
    (_BLOCK + r"(norm1|layernorm_before)\.", r"\1.attention_norm."),
    (_BLOCK + r"(norm2|layernorm_after)\.", r"\1.inner_norm."),
    (_BLOCK + r"attention\.(attention\.query|q_proj)\.", r"\1.query."),
    (_BLOCK + r"attention\.(attention\.key|k_proj)\.", r"\1.key."),
    (_BLOCK + r"attention\.(attention\.value|v_proj)\.", r"\1.value."),
    (_BLOCK + r"attention\.(output\.dense|output|o_proj)\.", r"\1.output."),
    (_BLOCK + r"(layer_scale1\.lambda1|gamma_1)$", r"\1.attention_scale"),
    (_BLOCK + r"(layer_scale2\.lambda1|gamma_2)$", r"\1.inner_scale"),
    (_BLOCK + r"(mlp|intermediate)\.fc1\.", r"\1.inner."),
    (_BLOCK + r"(mlp|intermediate)\.fc2\.", r"\1.outer."),
    (r"^encoder\.projector_layer\.", "encoder.levels.0.fuse."),
    (r"^encoder\.layer_norm\.", "encoder.levels.0.norm."),
    (_STAGE + r"(0|projector_layer)\.", r"encoder.levels.\1.fuse."),
    (_STAGE + r"(1|layer_norm)\.", r"encoder.levels.\1.norm."),
    (r"^encoder\.stages_sampling\.(\d+)\.(\d+)\.", r"encoder.levels.\1.samplers.\2."),
    (_STAGE + r"sampling_layers\.(\d+)\.layers\.", r"encoder.levels.\1.samplers.\2."),
    (_LEVEL + r"fuse\.(cv|conv)1\.", r"\1.fuse.first."),
    (_LEVEL + r"fuse\.(cv|conv)2\.", r"\1.fuse.last."),
    (_LEVEL + r"fuse\.(m|bottlenecks)\.(\d+)\.(cv|conv)1\.", r"\1.fuse.blocks.\3.0."),
    (_LEVEL + r"fuse\.(m|bottlenecks)\.(\d+)\.(cv|conv)2\.", r"\1.fuse.blocks.\3.1."),
    (r"^(encoder\.levels\..*)\.bn\.", r"\1.norm."),
    (r"^enc_output\.(\d+)\.", r"proposals.\1.projection."),
    (r"^enc_output_norm\.(\d+)\.", r"proposals.\1.norm."),
    (r"^enc_out_class_embed\.(\d+)\.", r"proposals.\1.class_head."),
    (r"^enc_out_bbox_embed\.(\d+)\.", r"proposals.\1.box_head."),
    (r"^query_feat\.", "query_content."),
    (r"^(refpoint_embed|reference_point_embed)\.", "reference_moves."),
    (r"^decoder\.ref_point_head\.", "decoder.position_head."),
    (r"^class_embed\.", "decoder.class_heads.0."),
    (r"^bbox_embed\.", "decoder.box_heads.0."),
    (r"\.cross_attn_layer_norm\.", ".cross_norm."),
    (r"^(decoder\.layers\.\d+)\.layer_norm\.", r"\1.feedforward.norm."),
)
"""As of ``layouts.Rules``."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    "activation_function": ("silu",),
    "decoder_activation_function": ("relu",),
    "attention_bias": (True,),
    "attention_dropout": (0, 0.0),
    "layer_norm_eps": (1e-5,),
    "batch_norm_eps": (1e-5,),
}
"""Settings of ``config.json`` that our detectors have."""
ONLY_BACKBONE: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("lw_detr_vit", "rf_detr_dinov2"),
    "hidden_act": ("gelu",),
    "qkv_bias": (True,),
    "layer_norm_eps": (1e-6,),
    "use_swiglu_ffn": (False,),
    "apply_layernorm": (True,),
    "reshape_hidden_states": (True,),
    "num_register_tokens": (0,),
    "use_absolute_position_embeddings": (True,),
}
"""Likewise of its ``backbone_config``."""
SCALES = {"P3": 2.0, "P4": 1.0, "P5": 0.5}
"""Official names of levels."""


def settled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names, those of the class token and of positions without dimensions of 1."""
    found = dict(tensors)
    if "backbone.class_token" in found:
        found["backbone.class_token"] = found["backbone.class_token"].flatten()
    positions = found.get("backbone.positions")
    if positions is not None and positions.dim() == 3:
        found["backbone.positions"] = positions.flatten(0, 1)
    return found


def architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tensors by our names show; nothing of one that is missing."""
    found: dict[str, Any] = {}
    groups = _count(tensors, r"proposals\.(\d+)\.norm\.weight")
    if groups and "query_content.weight" in tensors:
        found |= {"groups": groups, "queries": len(tensors["query_content.weight"]) // groups}
    within = tensors.get("encoder.levels.0.fuse.blocks.0.0.conv.weight")
    if within is not None and "decoder.norm.weight" in tensors:
        found["expansion"] = len(within) / len(tensors["decoder.norm.weight"])
    pair = r"encoder\.levels\.0\.fuse\.blocks\.(\d+)\.0\.conv\.weight"
    if pairs := _count(tensors, pair):
        found["projector_blocks"] = pairs
    return found


def backbone(tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the vision transformer.

    Args:
        tensors: by our names.
        own: with ``vit``, what ``unseen`` or ``official`` found of it.

    Raises:
        ValueError: a tensor is missing.
    """
    for name in ("backbone.patches.weight", "backbone.positions", "backbone.blocks.0.inner.weight"):
        if name not in tensors:
            raise ValueError(f"no tensor '{name}' (by our names) of a vision transformer")
    kernel, positions = tensors["backbone.patches.weight"], tensors["backbone.positions"]
    if kernel.dim() != 4 or positions.dim() != 2:
        raise ValueError(
            f"patches have shape {list(kernel.shape)} and positions {list(positions.shape)}"
        )
    width, patch, dinov2 = len(kernel), kernel.shape[-1], "backbone.class_token" in tensors
    vit = _assumed(width, patch) | own.get("vit", {})
    return {
        "name": "vit",
        "vit": vit
        | {
            "kind": "dinov2" if dinov2 else "lw_detr",
            "width": width,
            "blocks": vit["outputs"][-1],
            "expansion": len(tensors["backbone.blocks.0.inner.weight"]) // width,
            "patch": patch,
            "positions": math.isqrt(len(positions) - 1),
        },
    }


def _assumed(width: int, patch: int) -> dict[str, Any]:
    """What tensors of official RF-DETRs do not show: Base and Large have patches of 14 pixels."""
    old = patch == 14
    outputs = (2, 5, 8, 11) if old else (3, 6, 9, 12)
    whole = tuple(number for number in outputs[:-1])
    heads, windows = max(1, width // 64), 4 if old else 2
    return {"heads": heads, "windows": windows, "outputs": outputs, "whole": whole}


def unread(tensors: Mapping[str, Tensor], blocks: int) -> list[str]:
    """Names of tensors of backbone blocks that come after the last one whose features are read."""
    found = {name: re.match(r"backbone\.blocks\.(\d+)\.", name) for name in tensors}
    return [name for name, match in found.items() if match and int(match[1]) >= blocks]


def unseen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says and tensors do not show."""
    network = settings.get("backbone_config") or {}
    scales = tuple(map(float, settings.get("projector_scale_factors") or (1.0,)))
    found: dict[str, Any] = {
        "scales": scales,
        "heads": settings.get("decoder_self_attention_heads", 8),
        "cross_heads": settings.get("decoder_cross_attention_heads", 16),
    }
    if "out_indices" not in network:
        return found
    outputs, windows = tuple(network["out_indices"]), network.get("num_windows", 4)
    if network.get("model_type") == "lw_detr_vit":
        within, windows = network.get("window_block_indices") or (), math.isqrt(windows)
    else:  # theirs derives them from the outputs
        within = {*range(outputs[-1])} - {*outputs}
    whole = () if windows == 1 else tuple(k for k in range(outputs[-1]) if k not in within)
    heads = network.get("num_attention_heads", 12)
    vit = {"heads": heads, "windows": windows, "outputs": outputs, "whole": whole}
    return found | {"vit": vit}


def official(
    args: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], PreprocessingConfig, list[str]]:
    """What an official RF-DETR was trained with; what its arguments leave out is as published.

    Args:
        args: of the checkpoint; may be empty.
        tensors: by our names.

    Returns:
        Keys of the configuration, what is done to images (squares), and what was assumed.

    Raises:
        ValueError: a tensor that shows one of them is missing.
    """
    for name in ("decoder.norm.weight", "backbone.patches.weight", "backbone.positions"):
        if name not in tensors:
            raise ValueError(f"no tensor '{name}' (by our names)")
    width = len(tensors["decoder.norm.weight"])
    levels = args.get("projector_scale") or ["P4"]
    found: dict[str, Any] = {
        **official_heads(args, width),
        "scales": tuple(SCALES[level] for level in levels if level in SCALES),
    }
    vit: dict[str, Any] = {}
    if outputs := args.get("out_feature_indexes"):
        vit = {"outputs": tuple(outputs), "whole": tuple(outputs[:-1])}
    if "num_windows" in args:
        vit["windows"] = args["num_windows"]
        vit |= {"whole": ()} if vit["windows"] == 1 else {}
    patch = tensors["backbone.patches.weight"].shape[-1]
    side = args.get("resolution")
    if side is None:
        side = published_side(patch, math.isqrt(len(tensors["backbone.positions"])))
    expected = ("sa_nheads", "ca_nheads", "out_feature_indexes", "num_windows", "resolution")
    published = f"RF-DETR was published with for patches of {patch} pixels and width {width}"
    pixels = PreprocessingConfig(shortest_side=None, longest_side=None, exact_size=(side, side))
    return found | {"vit": vit}, pixels, assumed(args, expected, published)


def published_side(patch: int, positions: int) -> int:
    """Pixels of images' sides; Base and Large, of patches of 14, are larger than their positions.

    Args:
        patch: pixels of a patch's side.
        positions: along a side.
    """
    return 560 if patch == 14 else patch * positions


def official_heads(args: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Attention heads of the decoder by our keys; those of its width where args say nothing."""
    return {
        "heads": args.get("sa_nheads", width // 32),
        "cross_heads": args.get("ca_nheads", width // 16),
    }


def assumed(args: Mapping[str, Any], expected: Sequence[str], published: str) -> list[str]:
    """A note of what args leave out, if they do, and of what was taken for it."""
    missing = [key for key in expected if key not in args]
    note = f"its args say nothing of {', '.join(missing)}: assumed what {published}"
    return [note] if missing else []


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the highest number in names of this pattern."""
    found = [re.fullmatch(pattern, name) for name in tensors]
    return max((int(match[1]) for match in found if match), default=-1) + 1
