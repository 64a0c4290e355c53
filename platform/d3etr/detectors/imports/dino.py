"""DINO's tensors by others' names, and its architecture from them.

Names are those of the official code (IDEA-Research/DINO) and of detrex, whose position encoding is
another and whose layers have heads of their own; transformers has no DINO.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^backbone\.stem\.", "backbone."),
    (r"^backbone\.res(\d)\.", lambda match: f"backbone.layer{int(match[1]) - 1}."),
    (r"^(backbone\..*)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"^(backbone\..*)\.shortcut\.", r"\1.downsample.0."),
    (r"^(backbone\..*)conv(\d)\.norm\.", r"\1bn\2."),
    (r"^neck\.convs\.(\d+)\.", r"levels.projections.\1."),
    (r"^neck\.extra_convs\.(\d+)\.", r"levels.further.\1."),
    (r"^(levels\..*)\.conv\.", r"\1.0."),
    (r"^(levels\..*)\.norm\.", r"\1.1."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".linear1."),
    (r"\.ffns\.0\.layers\.1\.", ".linear2."),
    (r"^(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.attention."),
    (r"^(encoder\.layers\.\d+)\.norms\.0\.", r"\1.norm."),
    (r"^(encoder\.layers\.\d+)\.norms\.1\.", r"\1.feedforward.norm."),
    (r"^(decoder\.layers\.\d+)\.attentions\.0\.attn\.", r"\1.self_attn."),
    (r"^(decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
    (r"^(decoder\.layers\.\d+)\.norms\.0\.", r"\1.self_norm."),
    (r"^(decoder\.layers\.\d+)\.norms\.1\.", r"\1.cross_norm."),
    (r"^(decoder\.layers\.\d+)\.norms\.2\.", r"\1.feedforward.norm."),
    (r"^level_embeds?$", "position.level"),
    (r"^input_proj\.", "levels.projections."),
    (r"^tgt_embed\.", "query_content."),
    (r"^label_enc\.", "label_embedding."),
    (r"^enc_output\.", "proposals.projection."),
    (r"^enc_output_norm\.", "proposals.norm."),
    (r"^enc_out_class_embed\.", "proposals.class_head."),
    (r"^enc_out_bbox_embed\.", "proposals.box_head."),
    (r"^decoder\.ref_point_head\.", "decoder.position_head."),
    (r"^(decoder\.)?class_embed\.", "decoder.class_heads."),
    (r"^(decoder\.)?bbox_embed\.", "decoder.box_heads."),
)
"""As of ``layouts.Rules``."""
NORMS: tuple[tuple[str, str], ...] = ((r"\.norm1\.", ".cross_norm."), (r"\.norm2\.", ".self_norm."))
"""Likewise; numbered so, though self-attention is first."""

ONLY_ARGS: Mapping[str, tuple[Any, ...]] = {
    "transformer_activation": ("relu",),
    "query_dim": (4,),
    "two_stage_type": ("standard",),
    "two_stage_pat_embed": (0,),
    "two_stage_add_query_num": (0,),
    "two_stage_learn_wh": (False,),
    "decoder_sa_type": ("sa",),
    "decoder_module_seq": (["sa", "ca", "ffn"],),
    "dec_layer_number": (None,),
    "use_deformable_box_attn": (False,),
    "add_channel_attention": (False,),
}
"""Settings of official ``args`` that our detector has."""
_DETREX = "transformer.level_embeds"
"""A tensor of detrex's alone."""
_MAP = re.compile(r"levels\.projections\.\d+\.0\.weight")
"""The convolution that makes a feature level."""


def told(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Detrex's position encoding is Deformable DETR's."""
    return {"grid_temperature": 10_000.0, "grid_centred": True} if _DETREX in theirs else {}


def of_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """What official ``args`` say and tensors do not show; of empty ones, nothing.

    A detector that was trained without denoising has embeddings of classes all the same.
    """
    keys = {
        "dn_number": "queries",
        "dn_label_noise_ratio": "label_noise",
        "dn_box_noise_scale": "box_noise",
    }
    noise = {ours: args[theirs] for theirs, ours in keys.items() if args.get(theirs)}
    found: dict[str, Any] = {"denoising": noise} if noise else {}
    if "use_detached_boxes_dec_out" in args:
        found["look_forward_twice"] = not args["use_detached_boxes_dec_out"]
    return found


def architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tensors by our names show; nothing of one that is missing."""
    maps = [x for name, x in tensors.items() if _MAP.fullmatch(name)]
    stages = sum(tensor.shape[-1] == 1 for tensor in maps)  # further levels are 3x3 convolutions
    found: dict[str, Any] = {
        "learned_content": "query_content.weight" in tensors,
        "shared_heads": "decoder.class_heads.1.weight" not in tensors,
    }
    if stages:
        found["backbone_levels"] = stages
    if "query_content.weight" in tensors:
        found["queries"] = len(tensors["query_content.weight"])
    if "label_embedding.weight" not in tensors:
        found["denoising"] = {"queries": 0}
    return found


def settle(
    tensors: Mapping[str, Tensor], depth: int, agree: Callable[[Tensor, Tensor], bool]
) -> dict[str, Tensor]:
    """Say whose heads and levels are whose, and leave embeddings of no class out.

    Args:
        tensors: by our names, but for those.
        depth: decoder layers L.
        agree: whether two tensors are copies of each other.

    Raises:
        ValueError: fewer embeddings of classes than classes.
    """
    stages = sum(
        re.fullmatch(r"levels\.projections\.\d+\.0\.weight", x) is not None for x in tensors
    )
    settled: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = re.sub(
            r"^levels\.further\.(\d+)",
            lambda match: f"levels.projections.{stages + int(match[1])}",
            name,
        )
        # Detrex has one more head than layers: the first stage's.
        ours = re.sub(rf"^decoder\.(class|box)_heads\.{depth}\.", r"proposals.\1_head.", ours)
        settled[ours] = tensor
    heads = {
        name: [name.replace("_heads.0.", f"_heads.{layer}.") for layer in range(1, depth)]
        for name in settled
        if name.startswith(("decoder.class_heads.0.", "decoder.box_heads.0."))
    }
    if all(
        name in settled and agree(settled[first], settled[name])
        for first, names in heads.items()
        for name in names
    ):
        copies = {name for names in heads.values() for name in names}
        settled = {name: tensor for name, tensor in settled.items() if name not in copies}
    return _with_label_embedding(settled)


def _with_label_embedding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings of the classes, and zeros for slots without an object, as the codes have it."""
    bias = tensors.get("decoder.class_heads.0.bias")
    table = tensors.get("label_embedding.weight")
    if table is None or bias is None:
        return tensors
    if len(table) < len(bias):
        raise ValueError(
            f"'label_enc.weight' has {len(table)} rows, expected one for each of {len(bias)} "
            "classes"
        )
    nothing = torch.zeros_like(table[:1])
    return tensors | {"label_embedding.weight": torch.cat([table[: len(bias)], nothing])}
