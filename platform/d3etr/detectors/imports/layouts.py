"""The names that others give the tensors of a detector, and ours: one table per detector.

A table takes the official code's names and those of Hugging Face's transformers 4 and 5 alike.
Theirs is a ResNet with other names than torchvision's; timm's, which most published weights have,
shares torchvision's. A ResNet-vd has names of its own in both, an HGNetV2 in theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from d3etr.config.data import PreprocessingConfig
from d3etr.detectors.imports import (
    d_fine,
    deimv2,
    dino,
    dinov3,
    grouped,
    hgnet,
    lw_detr,
    resnet_vd,
    rt_detr,
)
from d3etr.detectors.imports.categories import COCO, COCO_SLOTS
from d3etr.detectors.imports.projections import fuse_projections, split_projections

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""(pattern, replacement), applied in order to every name."""
Agree = Callable[[Tensor, Tensor], bool]
"""Whether a tensor may be replaced by another that should be a copy of it."""
Network = Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Any] | None]
"""As of ``grouped.backbone`` and ``dinov3.backbone``."""
Official = Callable[
    [Mapping[str, Any], Mapping[str, Tensor]], tuple[dict[str, Any], PreprocessingConfig, list[str]]
]
"""As of ``grouped.official``."""


@dataclass(frozen=True)
class Layout:
    """How others name and arrange one detector.

    Attributes:
        sign: an official tensor that none of the detectors above it in ``LAYOUTS`` has; None: its
            official files are not known.
        model_types: Hugging Face's names.
        rules: of this detector alone, between ``FIRST`` and ``LAST``.
        softmax: classes and "no object" share one; all others were trained with a sigmoid each.
        only: settings of ``config.json`` that this detector has, beside those of all.
        architecture: keys of this kind's own configuration, from tensors by our names.
        unseen: keys that tensors do not show, from ``config.json`` (or nothing).
        only_args: settings of official ``args`` that this detector has, beside those of all.
        of_args: keys that tensors do not show, from official ``args`` (or nothing).
        told: keys that are tensors of theirs and none of ours, from those by their names.
        only_backbone: likewise of its ``backbone_config``, in place of those of convolutional ones.
        networks: likewise, of a network of such a ``model_type``.
        backbone: configuration of the kind's own network, from tensors by our names and the keys
            that tensors do not show; None, or of None: a ResNet or an HGNetV2.
        official: of the ``args`` of an official checkpoint and tensors by our names: keys that they
            say or that are so as published, preprocessing, and what was assumed.
        unread: names of tensors by our names that nothing of so many backbone blocks reads.
        activation: between linear layers of the decoder and of heads, where nothing says it.
        preprocessing: of official checkpoints, and of folders that say nothing.
        coco: outputs of official detectors of COCO.
    """

    sign: str | None
    model_types: tuple[str, ...]
    rules: Rules
    softmax: bool = False
    only: Mapping[str, tuple[Any, ...]] = field(
        default_factory=lambda: {"activation_function": ("relu",)}
    )
    architecture: Callable[[Mapping[str, Tensor]], dict[str, Any]] = lambda _: {}
    unseen: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _: {}
    only_args: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    of_args: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _: {}
    told: Callable[[Mapping[str, Tensor]], dict[str, Any]] = lambda _: {}
    only_backbone: Mapping[str, tuple[Any, ...]] | None = None
    networks: Mapping[str, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)
    backbone: Network | None = None
    official: Official | None = None
    unread: Callable[[Mapping[str, Tensor], int], list[str]] = lambda *_: []
    activation: str = "relu"
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    coco: int = COCO_SLOTS


_NESTED = r"(backbone\.(conv_encoder\.)?|conv_encoder\.)"
FIRST: Rules = (
    (rf"^(backbone\.0\.body|model\.{_NESTED}model(\._backbone)?)\.", "backbone."),
    (r"^(model|transformer)\.", ""),
    (r"^backbone\.embedder\.embedder\.convolution\.", "backbone.conv1."),
    (r"^backbone\.embedder\.embedder\.normalization\.", "backbone.bn1."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"\.encoder\.stages\.(\d+)\.layers\.", lambda match: f".layer{int(match[1]) + 1}."),
    (r"\.layer\.(\d+)\.convolution\.", lambda match: f".conv{int(match[1]) + 1}."),
    (r"\.layer\.(\d+)\.normalization\.", lambda match: f".bn{int(match[1]) + 1}."),
    (r"^(encoder\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"^(encoder\.layers\.\d+)\.(norm1|self_attn_layer_norm)\.", r"\1.norm."),
    (r"^(encoder\.layers\.\d+)\.norm2\.", r"\1.feedforward.norm."),
)
LAST: Rules = (
    (r"^input_proj(ection)?\.", "projection."),
    (r"^(class_embed|class_labels_classifier)\.", "class_head."),
    (r"^(bbox_embed|bbox_predictor|decoder\.bbox_embed)\.", "box_head."),
    (r"^(query_embed|query_position_embeddings)\.", "query_embedding."),
    (r"^decoder\.layernorm\.", "decoder.norm."),
    (r"\.(linear1|(mlp\.)?fc1)\.", ".feedforward.inner."),
    (r"\.(linear2|(mlp\.)?fc2)\.", ".feedforward.outer."),
    (r"\.(activation|(mlp\.)?activation_fn)\.", ".feedforward.activation."),
    (r"\.(norm1|self_attn_layer_norm)\.", ".self_norm."),
    (r"\.(norm2|encoder_attn_layer_norm)\.", ".cross_norm."),
    (r"\.(norm3|(mlp\.)?final_layer_norm)\.", ".feedforward.norm."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.(cross|multihead|encoder)_attn\.", ".cross_attention."),
    (r"\.(o|out|output)_proj\.", ".output."),
)
CONDITIONAL_LAYERS: Rules = (
    (r"\.self_attn\.(self_attn_layer_norm|self_norm)\.", ".self_norm."),
    (r"\.cross_attn\.cross_attn_layer_norm\.", ".cross_norm."),
    (r"\.(sa_|self_attn\.self_attn[._])", ".self_attn."),
    (r"\.(ca_|cross_attn\.cross_attn[._]|encoder_attn\.)", ".cross_attn."),
    (r"_attn\.(q|k|v)(?:uery|ey|alue)_", r"_attn.\1_"),
    (r"_attn\.([qk])(content|pos)_", r"_attn.\1_\2_"),
    (r"\.cross_attn\.q_content_proj\.", ".cross_attn.query_content."),
    (r"\.cross_attn\.q_pos_proj\.", ".cross_attn.query_embedding."),
    (r"\.cross_attn\.q_pos_sine_proj\.", ".cross_attn.query_spatial."),
    (r"\.cross_attn\.k_pos_proj\.", ".cross_attn.key_position."),
)
UNUSED = (
    ".num_batches_tracked",
    ".n_points_scale",
    ".num_points_scale",
    "decoder.anchors",
    "decoder.valid_mask",
    ".mask_token",
    ".rope_embed.periods",
    *d_fine.BINS,
)
"""Ends of names of what says nothing, or follows from other settings."""
SAMPLING: Rules = (
    (r"\.sampling_offsets\.", ".offsets."),
    (r"\.attention_weights\.", ".weights."),
    (r"\.value_proj\.", ".value."),
)
SQUARE = PreprocessingConfig(
    normalisation="unit", shortest_side=None, longest_side=None, exact_size=(640, 640)
)
"""What RT-DETR's and D-FINE's official code does to images."""


def _of_grouped(
    sign: str,
    model_type: str,
    official: Official,
    rules: Rules = (),
    only_args: Mapping[str, tuple[Any, ...]] = MappingProxyType({}),
) -> Layout:
    return Layout(
        sign=sign,
        model_types=(model_type,),
        rules=(*rules, *grouped.RULES, *SAMPLING),
        only=grouped.ONLY,
        architecture=grouped.architecture,
        unseen=grouped.unseen,
        only_args=only_args,
        only_backbone=grouped.ONLY_BACKBONE,
        backbone=grouped.backbone,
        official=official,
        unread=grouped.unread,
    )


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "rf_detr": _of_grouped(grouped.SIGN, "rf_detr", grouped.official),
        "lw_detr": _of_grouped(
            lw_detr.SIGN, "lw_detr", lw_detr.official, lw_detr.RULES, lw_detr.ONLY_ARGS
        ),
        "deimv2": Layout(
            activation="silu",
            preprocessing=SQUARE,
            coco=len(COCO),
            sign="decoder.decoder.layers.0.swish_ffn.w12.weight",
            model_types=("deimv2",),
            rules=(*deimv2.RULES, *SAMPLING),
            only=deimv2.ONLY,
            architecture=deimv2.architecture,
            unseen=deimv2.unseen,
            told=d_fine.told,
            networks={dinov3.MODEL: dinov3.ONLY},
            backbone=dinov3.backbone,
            official=deimv2.official,
        ),
        "d_fine": Layout(
            preprocessing=SQUARE,
            coco=len(COCO),
            sign="decoder.pre_bbox_head.layers.0.weight",
            model_types=("d_fine",),
            rules=(*d_fine.RULES, *SAMPLING),
            only=d_fine.ONLY,
            architecture=d_fine.architecture,
            unseen=d_fine.unseen,
            told=d_fine.told,
        ),
        "rt_detr": Layout(
            preprocessing=SQUARE,
            coco=len(COCO),
            sign="decoder.enc_score_head.weight",
            model_types=("rt_detr", "rt_detr_v2"),
            rules=(*rt_detr.RULES, *SAMPLING),
            only=rt_detr.ONLY,
            architecture=rt_detr.architecture,
            unseen=rt_detr.unseen,
        ),
        "dino": Layout(
            sign="label_enc.weight",
            model_types=(),
            rules=(*dino.RULES, *SAMPLING, *dino.NORMS),
            only_args=dino.ONLY_ARGS,
            architecture=dino.architecture,
            of_args=dino.of_args,
            told=dino.told,
        ),
        "deformable_detr": Layout(
            sign="transformer.level_embed",
            model_types=("deformable_detr",),
            rules=(
                (r"^level_embed$", "position.level"),
                (r"^input_proj\.", "levels.projections."),
                (r"^reference_points\.", "reference_head."),
                (r"^(query_embed|query_position_embeddings)\.", "queries."),
                (r"^enc_output\.", "proposals.projection."),
                (r"^enc_output_norm\.", "proposals.norm."),
                (r"^pos_trans\.", "proposals.embed."),
                (r"^pos_trans_norm\.", "proposals.embed_norm."),
                (r"^(decoder\.)?class_embed\.", "decoder.class_heads."),
                (r"^(decoder\.)?bbox_embed\.", "decoder.box_heads."),
                *SAMPLING,
                (r"\.norm1\.", ".cross_norm."),  # numbered so, though self-attention is first
                (r"\.norm2\.", ".self_norm."),
            ),
        ),
        "dab_detr": Layout(
            sign="refpoint_embed.weight",
            model_types=("dab-detr",),
            only={"activation_function": ("prelu",)},
            only_args={"transformer_activation": ("prelu",)},
            rules=(
                *CONDITIONAL_LAYERS,
                (r"^(refpoint_embed|query_refpoint_embeddings)\.", "anchors."),
                (r"^encoder\.query_scale\.", "encoder.position_scale."),
                (r"^decoder\.ref_point_head\.", "decoder.anchor_head."),
                (r"^decoder\.ref_anchor_head\.", "decoder.size_head."),
            ),
        ),
        "conditional_detr": Layout(
            sign="transformer.decoder.ref_point_head.layers.0.weight",
            model_types=("conditional_detr",),
            rules=(*CONDITIONAL_LAYERS, (r"^decoder\.ref_point_head\.", "ref_point_head.")),
        ),
        "detr": Layout(
            sign="transformer.decoder.layers.0.multihead_attn.in_proj_weight",
            model_types=("detr",),
            rules=(
                (r"^decoder\.(norm|layernorm)\.", "decoder_norm."),
                (r"^decoder\.layers\.", "decoder."),
            ),
            softmax=True,
        ),
    }
)
"""By our name of the detector, in the order in which to look for ``sign``."""


def official_detector(theirs: Mapping[str, Tensor]) -> str | None:
    """Our name of the detector whose official state dict this is, if it is one."""
    return next((name for name, layout in LAYOUTS.items() if layout.sign in theirs), None)


def rename(
    theirs: Mapping[str, Tensor],
    name: str,
    *,
    box_refinement: bool | None = None,
    shared_box_head: bool | None = None,
    agree: Agree = torch.equal,
) -> dict[str, Tensor]:
    """Every tensor under our names; what no rule knows fails to load.

    Args:
        theirs: an official state dict, or that of a Hugging Face ``...ForObjectDetection``.
        name: our name of the detector, a key of ``LAYOUTS``.
        box_refinement: Deformable DETR's: whether layers have heads of their own; None: as
            official checkpoints tell, whose decoder then holds the box heads, too.
        shared_box_head: DEIMv2's: as of ``deimv2.settled``.
        agree: asked of every two tensors that have one of our names; the second is kept.

    Raises:
        ValueError: what should be copies of one tensor differ.
    """
    if box_refinement is None:
        box_refinement = any(key.startswith("transformer.decoder.bbox_embed.") for key in theirs)
    rules = (*_first(theirs), *LAYOUTS[name].rules, *LAST)
    tensors: dict[str, Tensor] = {}
    for their_name, tensor in split_projections(theirs).items():
        ours = _by(rules, their_name)
        if not ours.endswith(UNUSED):
            _add(tensors, ours, tensor, their_name, agree)
    tensors = grouped.settled(hgnet.with_affine_blocks(tensors))
    fuse_projections(tensors)
    if "projection.weight" in tensors:  # a 1x1 convolution there, a linear layer here
        tensors["projection.weight"] = tensors["projection.weight"].flatten(1)
    if name == "deformable_detr":
        return _deformable(tensors, box_refinement, agree)
    if name == "deimv2":
        return deimv2.settled(tensors, shared_box_head, agree)
    if name == "dino":
        return dino.settle(tensors, decoder_depth(tensors), agree)
    return tensors


def rename_backbone(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a ResNet-vd or an HGNetV2 alone, official or Hugging Face's, under timm's names.

    What has other names already keeps them.
    """
    if not resnet_vd.is_resnet_vd(theirs) and not hgnet.is_hgnet(theirs):
        return dict(theirs)
    rules, ours = _first(theirs), "backbone."
    renamed = {_by(rules, ours + name.removeprefix("hgnetv2.")): x for name, x in theirs.items()}
    return {
        name.removeprefix(hgnet.OURS).removeprefix(ours): tensor
        for name, tensor in hgnet.with_affine_blocks(renamed).items()
    }


def _first(theirs: Mapping[str, Tensor]) -> Rules:
    """The rules that every name goes through first: the backbone's."""
    if hgnet.is_hgnet(theirs):
        return (*FIRST, *hgnet.RULES)
    return (*resnet_vd.RULES, *FIRST) if resnet_vd.is_resnet_vd(theirs) else FIRST


def _by(rules: Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def decoder_depth(tensors: Mapping[str, Tensor]) -> int:
    """Number of decoder layers L of renamed tensors."""
    layers = [re.match(r"decoder\.(?:layers\.)?(\d+)\.", name) for name in tensors]
    return max((int(match[1]) for match in layers if match), default=-1) + 1


def _add(tensors: dict[str, Tensor], name: str, tensor: Tensor, theirs: str, agree: Agree) -> None:
    """Add a tensor, or make sure that it is what is there under that name already."""
    if name in tensors and not agree(tensors[name], tensor):
        raise ValueError(f"'{theirs}' should hold what '{name}' does, but their values differ")
    tensors[name] = tensor


def _deformable(
    tensors: dict[str, Tensor], box_refinement: bool, agree: Agree
) -> dict[str, Tensor]:
    """Split position and content of queries, and say whose heads are whose."""
    depth = decoder_depth(tensors)
    if (queries := tensors.pop("queries.weight", None)) is not None:
        halves = queries.chunk(2, -1)
        tensors["query_embedding.weight"], tensors["query_content.weight"] = halves
    if box_refinement and "decoder.class_heads.1.weight" not in tensors:
        shared = {n: x for n, x in tensors.items() if n.startswith("decoder.class_heads.0.")}
        for index in range(1, depth):  # a file may hold one class head that all layers share
            tensors |= {n.replace(".0.", f".{index}."): x for n, x in shared.items()}
    settled: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours, head = name, re.match(r"^decoder\.(class|box)_heads\.(\d+)\.(.*)$", name)
        if head is not None and int(head[2]) == depth:  # one more than layers: the first stage's
            ours = f"proposals.{head[1]}_head.{head[3]}"
        elif head is not None and not box_refinement:
            ours = f"decoder.{head[1]}_heads.0.{head[3]}"
        _add(settled, ours, tensor, name, agree)
    return settled
