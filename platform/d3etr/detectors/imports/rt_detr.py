"""RT-DETR's tensors by others' names, and its architecture from them.

Names are those of transformers (``rt_detr``, ``rt_detr_v2``) and of the official PyTorch code of
both versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

RULES: tuple[tuple[str, str], ...] = (
    (r"^encoder_input_proj\.(\d+)\.0\.", r"encoder.projections.\1.conv."),
    (r"^encoder_input_proj\.(\d+)\.1\.", r"encoder.projections.\1.norm."),
    (r"^encoder\.input_proj\.(\d+)\.(0|conv)\.", r"encoder.projections.\1.conv."),
    (r"^encoder\.input_proj\.(\d+)\.(1|norm)\.", r"encoder.projections.\1.norm."),
    (r"^encoder\.(aifi|encoder)\.0\.layers\.(\d+)\.self_attn\.", r"encoder.layers.\2.attention."),
    (
        r"^encoder\.(aifi|encoder)\.0\.layers\.(\d+)\.(norm1|self_attn_layer_norm)\.",
        r"encoder.layers.\2.norm.",
    ),
    (
        r"^encoder\.(aifi|encoder)\.0\.layers\.(\d+)\.(norm2|final_layer_norm)\.",
        r"encoder.layers.\2.feedforward.norm.",
    ),
    (r"^encoder\.(aifi|encoder)\.0\.", "encoder."),
    (r"^encoder\.lateral_convs\.", "encoder.laterals."),
    (r"^encoder\.downsample_convs\.", "encoder.downsamples."),
    (r"^encoder\.fpn_blocks\.", "encoder.top_down."),
    (r"^encoder\.pan_blocks\.", "encoder.bottom_up."),
    (r"\.bottlenecks\.(\d+)\.conv1\.", r".blocks.\1.wide."),
    (r"\.bottlenecks\.(\d+)\.conv2\.", r".blocks.\1.narrow."),
    (r"^(encoder\.(top_down|bottom_up)\.\d+)\.conv1\.", r"\1.first."),
    (r"^(encoder\.(top_down|bottom_up)\.\d+)\.conv2\.", r"\1.shortcut."),
    (r"^(encoder\.(top_down|bottom_up)\.\d+)\.conv3\.", r"\1.last."),
    (r"^decoder_input_proj\.(\d+)\.0\.", r"levels.\1.conv."),
    (r"^decoder_input_proj\.(\d+)\.1\.", r"levels.\1.norm."),
    (r"^decoder\.input_proj\.", "levels."),
    (r"^decoder\.(enc_|denoising_class_embed|query_pos_head)", r"\1"),
    (r"^enc_output\.(0|proj)\.", "proposals.projection."),
    (r"^enc_output\.(1|norm)\.", "proposals.norm."),
    (r"^enc_score_head\.", "proposals.class_head."),
    (r"^enc_bbox_head\.", "proposals.box_head."),
    (r"^denoising_class_embed\.", "label_embedding."),
    (r"^weight_embedding\.|^decoder\.tgt_embed\.", "query_content."),
    (r"^(decoder\.)?query_pos_head\.", "decoder.position_head."),
    (r"^(decoder\.)?(class_embed|dec_score_head)\.", "decoder.class_heads."),
    (r"^(decoder\.)?(bbox_embed|dec_bbox_head)\.", "decoder.box_heads."),
    (r"^decoder\.decoder\.", "decoder."),
)
"""As of ``layouts.Rules``."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    "activation_function": ("silu",),
    "encoder_activation_function": ("gelu",),
    "decoder_activation_function": ("relu",),
    "positional_encoding_temperature": (10000,),
    "eval_size": (None,),
    "with_box_refine": (True,),
    "layer_norm_eps": (1e-5,),
    "batch_norm_eps": (1e-5,),
    "freeze_backbone_batch_norms": (True,),
    "decoder_offset_scale": (0.5,),
}
"""Settings of ``config.json`` that our detector has."""


def architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tensors by our names show; nothing of one that is missing."""
    rows = {
        "encoder_width": "encoder.projections.0.conv.weight",
        "encoder_feedforward": "encoder.layers.0.feedforward.inner.weight",
        "queries": "query_content.weight",
    }
    found: dict[str, Any] = {key: len(tensors[x]) for key, x in rows.items() if x in tensors}
    found["learned_content"] = "query_content.weight" in tensors
    within = tensors.get("encoder.top_down.0.first.conv.weight")
    if within is not None and "encoder_width" in found:
        found["expansion"] = len(within) / found["encoder_width"]
    if "label_embedding.weight" not in tensors:
        found["denoising"] = {"queries": 0}
    return found


def unseen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says and tensors do not show; empty settings: an official checkpoint."""
    method = settings.get("decoder_method", "default")
    sampling = "discrete" if method == "discrete" else "bilinear"
    return {"sampling": sampling} | denoising(settings)


def denoising(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says of denoising queries, if anything."""
    keys = {
        "num_denoising": "queries",
        "label_noise_ratio": "label_noise",
        "box_noise_scale": "box_noise",
    }
    noise = {ours: settings[theirs] for theirs, ours in keys.items() if theirs in settings}
    return {"denoising": noise} if noise else {}
