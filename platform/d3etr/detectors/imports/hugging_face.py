"""Names of Hugging Face's DETR, Conditional DETR, DAB-DETR and Deformable DETR.

Those of transformers 5 and 4. Their ResNet is a backbone of its own with other names than
torchvision's; timm's, which most published weights have, shares torchvision's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from d3etr.detectors.imports.heads_and_queries import decoder_depth, settle
from d3etr.detectors.imports.renaming import Scheme, rename

BACKBONE = (
    (r"^model\.backbone\.(conv_encoder\.)?model\.(_backbone\.)?", "backbone."),
    (r"^backbone\.embedder\.embedder\.convolution\.", "backbone.conv1."),
    (r"^backbone\.embedder\.embedder\.normalization\.", "backbone.bn1."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)
SHARED = (
    *BACKBONE,
    (r"^model\.input_projection\.", "projection."),
    (r"^model\.decoder\.layernorm\.", "decoder.norm."),
    (r"^model\.(encoder|decoder)\.", r"\1."),
    (r"(\.mlp)?\.fc1\.", ".feedforward.inner."),
    (r"(\.mlp)?\.fc2\.", ".feedforward.outer."),
    (r"(\.mlp)?\.final_layer_norm\.", ".feedforward.norm."),
    (r"^(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm."),
    (r"^(encoder\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"\.self_attn_layer_norm\.", ".self_norm."),
    (r"\.encoder_attn_layer_norm\.", ".cross_norm."),
    (r"\.(o_proj|out_proj|output_proj)\.", ".output."),
)
HEADS = (
    (r"^class_labels_classifier\.", "class_head."),
    (r"^bbox_predictor\.", "box_head."),
)
HEADS_OF_LAYERS = (
    (r"^decoder\.class_embed\.", "decoder.class_heads."),
    (r"^decoder\.bbox_embed\.", "decoder.box_heads."),
)
"""Deformable DETR's, which its decoder may hold once more."""
ENCODER_ATTENTION = {
    "attention.query_key": ("q_proj", "k_proj"),
    "attention.value": ("v_proj",),
}
CONDITIONAL_ATTENTION = {
    "self_attention.content": ("q_content_proj", "k_content_proj", "v_proj"),
    "self_attention.position": ("q_pos_proj", "k_pos_proj"),
    "cross_attention.key_value": ("k_content_proj", "v_proj"),
}
QUERY_ATTENTION = {
    "self_attention.query_key": ("q_proj", "k_proj"),
    "self_attention.value": ("v_proj",),
}

CONDITIONAL_DETR = Scheme(
    (
        *SHARED,
        *HEADS,
        (r"^model\.query_position_embeddings\.", "query_embedding."),
        (r"^decoder\.ref_point_head\.", "ref_point_head."),
        (r"\.sa_([qk])(content|pos)_proj\.", r".self_attn.\1_\2_proj."),
        (r"\.sa_v_proj\.", ".self_attn.v_proj."),
        (r"\.ca_qpos_sine_proj\.", ".encoder_attn.q_pos_sine_proj."),
        (r"\.ca_([qk])(content|pos)_proj\.", r".encoder_attn.\1_\2_proj."),
        (r"\.ca_v_proj\.", ".encoder_attn.v_proj."),
        (r"\.self_attn\.", ".self_attention."),
        (r"\.encoder_attn\.q_content_proj\.", ".cross_attention.query_content."),
        (r"\.encoder_attn\.q_pos_proj\.", ".cross_attention.query_embedding."),
        (r"\.encoder_attn\.q_pos_sine_proj\.", ".cross_attention.query_spatial."),
        (r"\.encoder_attn\.k_pos_proj\.", ".cross_attention.key_position."),
        (r"\.encoder_attn\.", ".cross_attention."),
    ),
    ENCODER_ATTENTION | CONDITIONAL_ATTENTION,
)
DETR = Scheme(
    (
        *SHARED,
        *HEADS,
        (r"^model\.query_position_embeddings\.", "query_embedding."),
        (r"^decoder\.norm\.", "decoder_norm."),
        (r"^decoder\.layers\.", "decoder."),
        (r"\.self_attn\.", ".self_attention."),
        (r"\.encoder_attn\.q_proj\.", ".cross_attention.query."),
        (r"\.encoder_attn\.k_proj\.", ".cross_attention.key."),
        (r"\.encoder_attn\.v_proj\.", ".cross_attention.value."),
        (r"\.encoder_attn\.", ".cross_attention."),
    ),
    ENCODER_ATTENTION | QUERY_ATTENTION,
)
DAB_DETR = Scheme(
    (
        *SHARED,
        *HEADS,
        (r"^class_embed\.", "class_head."),
        (r"^model\.query_refpoint_embeddings\.", "anchors."),
        (r"^encoder\.query_scale\.", "encoder.position_scale."),
        (r"^decoder\.ref_point_head\.", "decoder.anchor_head."),
        (r"^decoder\.ref_anchor_head\.", "decoder.size_head."),
        (r"(\.mlp)?\.activation_fn\.", ".feedforward.activation."),
        (r"\.self_attn\.self_norm\.", ".self_norm."),
        (r"\.self_attn\.self_attn\.", ".self_attention."),
        (r"\.self_attn\.self_attn_(query|key)_(content|pos)_proj\.", r".self_attention.\1_\2."),
        (r"\.self_attn\.self_attn_value_proj\.", ".self_attention.v_proj."),
        (r"\.cross_attn\.cross_attn_layer_norm\.", ".cross_norm."),
        (r"\.cross_attn\.cross_attn\.", ".cross_attention."),
        (r"\.cross_attn\.cross_attn_query_content_proj\.", ".cross_attention.query_content."),
        (r"\.cross_attn\.cross_attn_query_pos_proj\.", ".cross_attention.query_embedding."),
        (r"\.cross_attn\.cross_attn_query_pos_sine_proj\.", ".cross_attention.query_spatial."),
        (r"\.cross_attn\.cross_attn_key_pos_proj\.", ".cross_attention.key_position."),
        (r"\.cross_attn\.cross_attn_key_content_proj\.", ".cross_attention.k_content_proj."),
        (r"\.cross_attn\.cross_attn_value_proj\.", ".cross_attention.v_proj."),
    ),
    {
        **ENCODER_ATTENTION,
        "self_attention.content": ("query_content", "key_content", "v_proj"),
        "self_attention.position": ("query_pos", "key_pos"),
        "cross_attention.key_value": ("k_content_proj", "v_proj"),
    },
    copies=((r"^decoder\.bbox_embed\.", "box_head."),),
)
DEFORMABLE_DETR = Scheme(
    (
        *SHARED,
        (r"^model\.level_embed$", "position.level"),
        (r"^model\.input_proj\.", "levels.projections."),
        (r"^model\.reference_points\.", "reference_head."),
        (r"^model\.query_position_embeddings\.", "queries."),
        (r"^model\.enc_output\.", "proposals.projection."),
        (r"^model\.enc_output_norm\.", "proposals.norm."),
        (r"^model\.pos_trans\.", "proposals.embed."),
        (r"^model\.pos_trans_norm\.", "proposals.embed_norm."),
        (r"^(class|bbox)_embed\.", r"decoder.\1_embed."),
        (r"\.sampling_offsets\.", ".offsets."),
        (r"\.attention_weights\.", ".weights."),
        (r"\.value_proj\.", ".value."),
        (r"\.self_attn\.", ".self_attention."),
        (r"\.encoder_attn\.", ".cross_attention."),
    ),
    QUERY_ATTENTION,
    copies=HEADS_OF_LAYERS,
)
SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "detr": DETR,
        "conditional_detr": CONDITIONAL_DETR,
        "dab_detr": DAB_DETR,
        "deformable_detr": DEFORMABLE_DETR,
    }
)


def from_hugging_face(
    theirs: Mapping[str, Tensor], name: str, *, box_refinement: bool = False
) -> dict[str, Tensor]:
    """Every tensor of a ``...ForObjectDetection`` under our names.

    Args:
        theirs: its state dict.
        name: our name of the detector, a key of ``SCHEMES``.
        box_refinement: Deformable DETR's: whether layers have heads of their own.

    Raises:
        ValueError: what should be copies of one tensor differ.
    """
    tensors = rename(theirs, SCHEMES[name])
    renamed = {_stage(ours): tensor for ours, tensor in tensors.items()}
    if box_refinement:
        _untie(renamed)
    return settle(renamed, name, box_refinement)


def _untie(tensors: dict[str, Tensor]) -> None:
    """Give each layer its class head where a file holds one that all layers share."""
    first = "decoder.class_heads.0."
    if "decoder.class_heads.1.weight" in tensors:
        return
    for name in [name for name in tensors if name.startswith(first)]:
        for index in range(1, decoder_depth(tensors)):
            tensors[f"decoder.class_heads.{index}.{name.removeprefix(first)}"] = tensors[name]


def _stage(name: str) -> str:
    """Stages, blocks and layers of their ResNet under torchvision's names."""
    match = re.match(r"^backbone\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(.*)$", name)
    if match is None:
        return name
    stage, block, rest = match.groups()
    inner = re.match(r"^layer\.(\d+)\.(convolution|normalization)\.(.*)$", rest)
    if inner is not None:
        kind = "conv" if inner[2] == "convolution" else "bn"
        rest = f"{kind}{int(inner[1]) + 1}.{inner[3]}"
    return f"backbone.layer{int(stage) + 1}.{block}.{rest}"
