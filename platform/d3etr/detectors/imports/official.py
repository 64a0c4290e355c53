"""Names of the official checkpoints of DETR, Conditional DETR, DAB-DETR and Deformable DETR.

(github.com/facebookresearch/detr, Atten4Vis/ConditionalDETR, IDEA-Research/DAB-DETR,
fundamentalvision/Deformable-DETR.) Their ResNets are torchvision's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from d3etr.detectors.imports.heads_and_queries import settle
from d3etr.detectors.imports.hugging_face import ENCODER_ATTENTION, HEADS_OF_LAYERS, QUERY_ATTENTION
from d3etr.detectors.imports.renaming import Rules, Scheme, rename, split_projections

SHARED: Rules = (
    (r"^backbone\.0\.body\.", "backbone."),
    (r"^transformer\.(encoder|decoder)\.", r"\1."),
    (r"\.linear1\.", ".feedforward.inner."),
    (r"\.linear2\.", ".feedforward.outer."),
    (r"\.activation\.", ".feedforward.activation."),
    (r"^(encoder\.layers\.\d+)\.norm1\.", r"\1.norm."),
    (r"^(encoder\.layers\.\d+)\.norm2\.", r"\1.feedforward.norm."),
    (r"\.norm3\.", ".feedforward.norm."),
    (r"^(encoder\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.(cross|multihead)_attn\.", ".cross_attention."),
    (r"\.(out_proj|output_proj)\.", ".output."),
)
SELF_ATTENTION_FIRST: Rules = ((r"\.norm1\.", ".self_norm."), (r"\.norm2\.", ".cross_norm."))
CROSS_ATTENTION_FIRST: Rules = ((r"\.norm1\.", ".cross_norm."), (r"\.norm2\.", ".self_norm."))
"""Deformable DETR numbers its norms so, though its self-attention runs first, too."""
ONE_LEVEL: Rules = (
    (r"^input_proj\.", "projection."),
    (r"^class_embed\.", "class_head."),
    (r"^bbox_embed\.", "box_head."),
    (r"^query_embed\.", "query_embedding."),
)
CONDITIONAL_LAYERS: Rules = (
    (r"\.sa_([qk])(content|pos)_proj\.", r".self_attention.\1_\2."),
    (r"\.sa_v_proj\.", ".self_attention.v_proj."),
    (r"\.ca_qcontent_proj\.", ".cross_attention.query_content."),
    (r"\.ca_qpos_proj\.", ".cross_attention.query_embedding."),
    (r"\.ca_qpos_sine_proj\.", ".cross_attention.query_spatial."),
    (r"\.ca_kpos_proj\.", ".cross_attention.key_position."),
    (r"\.ca_kcontent_proj\.", ".cross_attention.k_content."),
    (r"\.ca_v_proj\.", ".cross_attention.v_proj."),
)
CONDITIONAL_ATTENTION = {
    **ENCODER_ATTENTION,
    "self_attention.content": ("q_content", "k_content", "v_proj"),
    "self_attention.position": ("q_pos", "k_pos"),
    "cross_attention.key_value": ("k_content", "v_proj"),
}

DETR = Scheme(
    (
        *SHARED,
        *SELF_ATTENTION_FIRST,
        *ONE_LEVEL,
        (r"\.cross_attention\.q_proj\.", ".cross_attention.query."),
        (r"\.cross_attention\.k_proj\.", ".cross_attention.key."),
        (r"\.cross_attention\.v_proj\.", ".cross_attention.value."),
        (r"^decoder\.norm\.", "decoder_norm."),
        (r"^decoder\.layers\.", "decoder."),
    ),
    ENCODER_ATTENTION | QUERY_ATTENTION,
)
CONDITIONAL_DETR = Scheme(
    (
        *SHARED,
        *SELF_ATTENTION_FIRST,
        *ONE_LEVEL,
        *CONDITIONAL_LAYERS,
        (r"^decoder\.ref_point_head\.", "ref_point_head."),
    ),
    CONDITIONAL_ATTENTION,
)
DAB_DETR = Scheme(
    (
        *SHARED,
        *SELF_ATTENTION_FIRST,
        *ONE_LEVEL,
        *CONDITIONAL_LAYERS,
        (r"^refpoint_embed\.", "anchors."),
        (r"^encoder\.query_scale\.", "encoder.position_scale."),
        (r"^decoder\.ref_point_head\.", "decoder.anchor_head."),
        (r"^decoder\.ref_anchor_head\.", "decoder.size_head."),
    ),
    CONDITIONAL_ATTENTION,
    copies=((r"^decoder\.bbox_embed\.", "box_head."),),
)
DEFORMABLE_DETR = Scheme(
    (
        *SHARED,
        *CROSS_ATTENTION_FIRST,
        (r"^transformer\.level_embed$", "position.level"),
        (r"^transformer\.reference_points\.", "reference_head."),
        (r"^transformer\.enc_output\.", "proposals.projection."),
        (r"^transformer\.enc_output_norm\.", "proposals.norm."),
        (r"^transformer\.pos_trans\.", "proposals.embed."),
        (r"^transformer\.pos_trans_norm\.", "proposals.embed_norm."),
        (r"^input_proj\.", "levels.projections."),
        (r"^query_embed\.", "queries."),
        (r"^(class|bbox)_embed\.", r"decoder.\1_embed."),
        (r"\.sampling_offsets\.", ".offsets."),
        (r"\.attention_weights\.", ".weights."),
        (r"\.value_proj\.", ".value."),
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
SIGNS: Mapping[str, str] = MappingProxyType(
    {
        "deformable_detr": "transformer.level_embed",
        "dab_detr": "refpoint_embed.weight",
        "conditional_detr": "transformer.decoder.ref_point_head.layers.0.weight",
        "detr": "transformer.decoder.layers.0.multihead_attn.in_proj_weight",
    }
)
"""A tensor that only this detector has, in the order in which to look: DAB-DETR has Conditional
DETR's."""


def official_detector(theirs: Mapping[str, Tensor]) -> str | None:
    """Our name of the detector whose official state dict this is, if it is one."""
    return next((name for name, sign in SIGNS.items() if sign in theirs), None)


def refines_boxes(theirs: Mapping[str, Tensor]) -> bool:
    """Whether an official Deformable DETR refines boxes: its decoder then holds the heads, too."""
    return any(name.startswith("transformer.decoder.bbox_embed.") for name in theirs)


def from_official(theirs: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Every tensor of an official checkpoint under our names.

    Args:
        theirs: the checkpoint's ``model``.
        name: our name of the detector, a key of ``SCHEMES``.

    Raises:
        ValueError: what should be copies of one tensor differ.
    """
    renamed = rename(split_projections(theirs), SCHEMES[name])
    return settle(renamed, name, refines_boxes(theirs))
