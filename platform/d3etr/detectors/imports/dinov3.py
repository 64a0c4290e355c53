"""DINOv3's tensors below a DEIMv2 by others' names, and its configuration.

Names are those of transformers (``dinov3_vit``) and of the official code, which has two networks:
DINOv3's (``backbone.dinov3``) for L and X, and a plainer one (``_model`` in it) for S and M.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MODEL = "dinov3_vit"
"""Hugging Face's name."""
_BLOCK = r"^(backbone\.blocks\.\d+)\."
_NUMBERED = re.compile(r"backbone\.blocks\.(\d+)\.(?:up_proj\.(.*))?")
RULES: tuple[tuple[str, str], ...] = (
    (r"^conv_encoder\.backbone\.(model\.)?", "backbone."),
    (r"^backbone\.dinov3\.(_model\.)?", "backbone."),
    (r"^backbone\.(layer|blocks)\.(\d+)\.", r"backbone.blocks.\2."),
    (r"^backbone\.(embeddings\.)?cls_token$", "backbone.class_token"),
    (r"^backbone\.(embeddings\.register_tokens|storage_tokens)$", "backbone.registers"),
    (r"^backbone\.(embeddings\.patch_embeddings|patch_embed\.proj)\.", "backbone.patches."),
    (_BLOCK + r"norm1\.", r"\1.attention_norm."),
    (_BLOCK + r"norm2\.", r"\1.inner_norm."),
    (_BLOCK + r"(attention|attn)\.q_proj\.", r"\1.query."),
    (_BLOCK + r"(attention|attn)\.k_proj\.", r"\1.key."),
    (_BLOCK + r"(attention|attn)\.v_proj\.", r"\1.value."),
    (_BLOCK + r"(attention\.o_proj|attn\.proj)\.", r"\1.output."),
    (_BLOCK + r"(layer_scale1\.lambda1|ls1\.gamma)$", r"\1.attention_scale"),
    (_BLOCK + r"(layer_scale2\.lambda1|ls2\.gamma)$", r"\1.inner_scale"),
    (_BLOCK + r"mlp\.fc1\.", r"\1.inner."),
    (_BLOCK + r"mlp\.(fc2|w3|down_proj)\.", r"\1.outer."),
    (_BLOCK + r"mlp\.(w1|gate_proj)\.", r"\1.gate_proj."),
    (_BLOCK + r"mlp\.(w2|up_proj)\.", r"\1.up_proj."),
    (r"^(conv_encoder\.spatial_tuning_adapter|backbone\.sta)\.", "backbone.details."),
    (r"^backbone\.details\.stem(_conv)?\.", "backbone.details.conv1."),
    (r"^backbone\.details\.conv([12])\.0\.", r"backbone.details.conv\1.conv."),
    (r"^backbone\.details\.conv([12])\.1\.", r"backbone.details.conv\1.norm."),
    (r"^backbone\.details\.conv([34])\.1\.", r"backbone.details.conv\1.conv."),
    (r"^backbone\.details\.conv([34])\.2\.", r"backbone.details.conv\1.norm."),
    *((rf"^backbone\.details\.conv{k + 1}\.", f"backbone.details.{k}.") for k in range(4)),
    (r"^conv_encoder\.fusion_proj\.", "encoder.projections."),
    (r"^backbone\.convs\.(\d)\.", r"encoder.projections.\1.conv."),
    (r"^backbone\.norms\.(\d)\.", r"encoder.projections.\1.norm."),
)
"""As of ``layouts.Rules``."""
ONLY: Mapping[str, tuple[Any, ...]] = {
    "patch_size": (16,),
    "num_channels": (3,),
    "query_bias": (True,),
    "value_bias": (True,),
    "proj_bias": (True,),
    "mlp_bias": (True,),
    "rope_theta": (100, 100.0),
    "hidden_act": ("gelu", "silu"),
    "attention_dropout": (0, 0.0),
    "drop_path_rate": (0, 0.0),
    "reshape_hidden_states": (True,),
}
"""Settings of ``backbone_config`` that our network has. ``pos_embed_rescale`` and its like are
about training alone, where ours does not change coordinates."""


def is_dinov3(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors by our names are a detector's over a DINOv3."""
    return "backbone.patches.weight" in tensors


def settled(tensors: dict[str, Tensor]) -> None:
    """Bring tensors by our names into our shapes, in place; the class token has its own already.

    The plainer official network scales nothing: ones take the place of its scales.

    Raises:
        ValueError: there is no class token.
    """
    if not is_dinov3(tensors):
        return
    if "backbone.class_token" not in tensors:
        raise ValueError("no tensor 'backbone.class_token' (by our names)")
    registers = tensors.pop("backbone.registers", None)
    if registers is not None and registers.numel():
        width = registers.shape[-1] if registers.dim() else 1
        tensors["backbone.registers"] = registers.reshape(-1, width)
    width = len(tensors["backbone.class_token"])
    for name in [*tensors]:
        if (match := _NUMBERED.match(name)) is None:
            continue
        if match[2] is not None:
            tensors[f"backbone.blocks.{match[1]}.inner.{match[2]}"] = tensors.pop(name)
        for part in ("attention_scale", "inner_scale"):
            tensors.setdefault(f"backbone.blocks.{match[1]}.{part}", torch.ones(width))


def backbone(tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Any] | None:
    """Configuration of the network that tensors by our names are of, if it is a DINOv3.

    Args:
        tensors: of the whole detector.
        own: keys that tensors do not show, under ``dinov3``.

    Raises:
        ValueError: a tensor that shows one of them is missing.
    """
    if not is_dinov3(tensors):
        return None
    first = "backbone.blocks.0."
    names = ("backbone.details.0.conv.weight", f"{first}outer.weight", f"{first}inner.weight")
    for name in names:
        if name not in tensors or tensors[name].dim() < 2:
            raise ValueError(f"no such tensor as '{name}' (by our names) has to be")
    detail, outer, inner = (tensors[name] for name in names)
    told = {"feedforward": "silu_gated" if len(inner) > outer.shape[1] else "gelu"}
    blocks = {int(match[1]) for match in map(_NUMBERED.match, tensors) if match}
    shown = {
        "width": len(outer),
        "inner": outer.shape[1],
        "blocks": len(blocks),
        "registers": len(tensors.get("backbone.registers", ())),
        "key_bias": f"{first}key.bias" in tensors,
        "detail": len(detail),
    }
    return {"name": "dinov3", "dinov3": told | shown | own.get("dinov3", {})}


def unseen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says of the network and tensors do not show, if it is a DINOv3."""
    theirs = settings.get("backbone_config") or {}
    if theirs.get("model_type") != MODEL:
        return {}
    gated, act = theirs.get("use_gated_mlp", False), theirs.get("hidden_act", "gelu")
    outputs, names = theirs.get("out_indices"), theirs.get("out_features")
    if outputs is None and isinstance(names, list):
        numbers = (re.fullmatch(r"stage(\d{1,3})", str(name)) for name in names)
        outputs = [int(number[1]) for number in numbers if number]
    found = {
        "heads": theirs.get("num_attention_heads", 6),
        "feedforward": f"{act}_gated" if gated else act,
        "epsilon": theirs.get("layer_norm_eps", 1e-5),
        "first_scale": theirs.get("layerscale_value", 1.0),
        "outputs": tuple(outputs) if isinstance(outputs, list) else outputs,
        "normed": "all" if theirs.get("apply_layernorm", True) else "last",
    }
    return {"dinov3": found}


def official(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is so as published: L's and X's if there is a last norm, else S's and M's."""
    width = len(tensors["backbone.class_token"])
    last = len({match[1] for match in map(_NUMBERED.match, tensors) if match})
    normed = "backbone.norm.weight" in tensors
    return {
        "heads": max(1, width // 64),
        "epsilon": 1e-5 if normed else 1e-6,
        "first_scale": 1e-5 if normed else 1.0,
        "outputs": (last // 2, 3 * last // 4, last) if normed else (last // 3, 2 * last // 3, last),
        "normed": "all" if normed else "none",
    }
