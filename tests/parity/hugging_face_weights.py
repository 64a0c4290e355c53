"""Names and fused blocks: the state dict of Hugging Face's Conditional DETR as ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

RENAMED = (
    (r"^model\.query_position_embeddings\.", "query_embedding."),
    (r"^model\.input_projection\.", "projection."),
    (r"^model\.decoder\.ref_point_head\.", "ref_point_head."),
    (r"^model\.decoder\.layernorm\.", "decoder.norm."),
    (r"^model\.(encoder|decoder)\.", r"\1."),
    (r"^class_labels_classifier\.", "class_head."),
    (r"^bbox_predictor\.", "box_head."),
    (r"\.mlp\.fc1\.", ".feedforward.inner."),
    (r"\.mlp\.fc2\.", ".feedforward.outer."),
    (r"\.final_layer_norm\.", ".feedforward.norm."),
    (r"^(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm."),
    (r"^(encoder\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"\.self_attn_layer_norm\.", ".self_norm."),
    (r"\.encoder_attn_layer_norm\.", ".cross_norm."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.encoder_attn\.q_content_proj\.", ".cross_attention.query_content."),
    (r"\.encoder_attn\.q_pos_proj\.", ".cross_attention.query_embedding."),
    (r"\.encoder_attn\.q_pos_sine_proj\.", ".cross_attention.query_spatial."),
    (r"\.encoder_attn\.k_pos_proj\.", ".cross_attention.key_position."),
    (r"\.encoder_attn\.", ".cross_attention."),
    (r"\.o_proj\.", ".output."),
)
FUSED = (
    ("encoder.layers.", ".attention.query_key.", ("q_proj", "k_proj")),
    ("encoder.layers.", ".attention.value.", ("v_proj",)),
    (
        "decoder.layers.",
        ".self_attention.content.",
        ("q_content_proj", "k_content_proj", "v_proj"),
    ),
    ("decoder.layers.", ".self_attention.position.", ("q_pos_proj", "k_pos_proj")),
    ("decoder.layers.", ".cross_attention.key_value.", ("k_content_proj", "v_proj")),
)
RESNET = (
    (r"^model\.backbone\.model\.embedder\.embedder\.convolution\.", "backbone.conv1."),
    (r"^model\.backbone\.model\.embedder\.embedder\.normalization\.", "backbone.bn1."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)


def from_hugging_face(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of ``ConditionalDetrForObjectDetection`` under our names."""
    transformer = {n: t for n, t in theirs.items() if not n.startswith("model.backbone.")}
    backbone = {n: t for n, t in theirs.items() if n.startswith("model.backbone.")}
    renamed = {_rename(name, RENAMED): tensor for name, tensor in transformer.items()}
    weight = renamed["projection.weight"]  # a 1x1 convolution is a linear layer of ours
    renamed["projection.weight"] = weight.flatten(1)
    return _fuse(renamed) | {_resnet_name(name): tensor for name, tensor in backbone.items()}


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack separate projections where ours is one; what is not used stays and fails to load."""
    for prefix, fused, parts in FUSED:
        middle = fused.rsplit(".", 2)[0]
        first = re.compile(rf"^({prefix}\d+{re.escape(middle)})\.{parts[0]}\.(weight|bias)$")
        for match in [m for m in map(first.match, list(tensors)) if m]:
            layer, kind = match.groups()
            blocks = [tensors.pop(f"{layer}.{part}.{kind}") for part in parts]
            tensors[layer + fused[len(middle) :] + kind] = torch.cat(blocks)
    return tensors


def _resnet_name(name: str) -> str:
    name = _rename(name, RESNET)
    match = re.match(r"^model\.backbone\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(.*)$", name)
    if match is None:
        return name
    stage, block, rest = match.groups()
    inner = re.match(r"^layer\.(\d+)\.(convolution|normalization)\.(.*)$", rest)
    if inner is not None:
        kind = "conv" if inner[2] == "convolution" else "bn"
        rest = f"{kind}{int(inner[1]) + 1}.{inner[3]}"
    return f"backbone.layer{int(stage) + 1}.{block}.{rest}"
