"""DEIMv2's tensors by others' names, and its architecture from them.

Names are those of transformers (``deimv2``) and of the official code. Both compute a CSP stage's
shortcut and what its blocks see by one convolution, whose two halves are two convolutions here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from d3etr.config.data import PreprocessingConfig
from d3etr.detectors.imports import d_fine, dinov3, rt_detr

_FUSIONS = r"^(encoder\.(?:top_down|bottom_up)\.\d+)\."
_SPLIT = re.compile(r"^(encoder\.(?:top_down|bottom_up)\.\d+\.stage[12])\.split\.(.*)$")
_BOX_HEAD = re.compile(r"^decoder\.box_heads\.(\d+)\.(.*)$")
RULES: tuple[tuple[str, str], ...] = (
    *dinov3.RULES,
    (r"^conv_encoder\.encoder_input_proj\.", "encoder.projections."),
    (r"^encoder\.input_proj\.", "encoder.projections."),
    (r"^decoder(\.|_)input_proj\.", "levels."),
    (r"^encoder\.(down_conv1|down_sample1)\.", "encoder.coarser.1."),
    (r"^encoder\.(down_conv2|down_sample2)\.", "encoder.downsamples.0.1."),
    (r"^(encoder\.(?:coarser|downsamples\.0)\.1)\.1\.", r"\1.conv."),
    (r"^(encoder\.(?:coarser|downsamples\.0)\.1)\.2\.", r"\1.norm."),
    (r"^encoder\.(bi_fusion_conv|bi_fusion\.cv)\.", "encoder.context."),
    (r"^encoder\.fpn_block\.", "encoder.fpn_blocks.0."),
    (r"^encoder\.pan_block\.", "encoder.pan_blocks.0."),
    (r"^encoder\.fpn_blocks\.", "encoder.top_down."),
    (r"^encoder\.pan_blocks\.", "encoder.bottom_up."),
    (_FUSIONS + r"(conv|cv)1\.", r"\1.enter."),
    (_FUSIONS + r"(conv2|cv4)\.", r"\1.leave."),
    (_FUSIONS + r"(csp_rep1\.conv2|cv2\.1)\.", r"\1.mix1."),
    (_FUSIONS + r"(csp_rep2\.conv2|cv3\.1)\.", r"\1.mix2."),
    (_FUSIONS + r"(csp_rep1|cv2\.0)\.", r"\1.stage1."),
    (_FUSIONS + r"(csp_rep2|cv3\.0)\.", r"\1.stage2."),
    (_FUSIONS + r"stage([12])\.conv1\.", r"\1.stage\2.split."),
    (r"^(decoder\..*)\.swish_ffn\.w12\.", r"\1.feedforward.inner."),
    (r"^(decoder\..*)\.(swish_ffn\.w3|mlp\.down_proj)\.", r"\1.feedforward.outer."),
    (r"^(decoder\..*)\.mlp\.(gate|up)_proj\.", r"\1.feedforward.\2_proj."),
    (r"^(decoder\..*norm\d?)\.scale$", r"\1.weight"),
    *d_fine.LAYERS,
    *rt_detr.RULES,
    *d_fine.HEADS,
)
"""As of ``layouts.Rules``."""
ONLY: Mapping[str, tuple[Any, ...]] = {
    **d_fine.ONLY,
    "decoder_activation_function": ("relu", "silu"),
    "encoder_fuse_op": ("sum",),
    "normalize_before": (False,),
}
"""Settings of ``config.json`` that our detector has."""


def settled(
    tensors: Mapping[str, Tensor], shared: bool | None, agree: Callable[[Tensor, Tensor], bool]
) -> dict[str, Tensor]:
    """Tensors by our names: a CSP stage's two convolutions, and one box head where all share it.

    Args:
        tensors: renamed by ``RULES``.
        shared: whether all layers have one box head; None: if all have the same numbers.
        agree: as of ``layouts.rename``.

    Raises:
        ValueError: a tensor has not the shape that it has in any of them.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (match := _SPLIT.match(name)) is None:
            ours[name] = tensor
            continue
        if not tensor.dim() or len(tensor) % 2:
            raise ValueError(f"'{name}' (by our names) of shape {list(tensor.shape)} has no halves")
        for part, half in zip(("shortcut", "first"), tensor.chunk(2), strict=True):
            ours[f"{match[1]}.{part}.{match[2]}"] = half
    dinov3.settled(ours)
    heads: dict[str, list[str]] = {}
    for name in sorted(ours):
        if match := _BOX_HEAD.match(name):
            heads.setdefault(f"decoder.box_heads.0.{match[2]}", []).append(name)
    if shared is None:  # of tensors that are one, a file may have one of any number
        shared = all(
            torch.equal(ours[x], ours[names[0]]) for names in heads.values() for x in names
        )
    if shared:
        for first, names in heads.items():
            kept, *others = (ours.pop(name) for name in names)
            for other in others:
                agree(other, kept)
            ours[first] = kept
    return ours


def architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tensors by our names show; nothing of one that is missing."""
    found = d_fine.architecture(tensors)
    lite = "encoder.context.conv.weight" in tensors
    found["levels"] += lite
    found["encoder"] = "lite" if lite else "hybrid"
    found["fusion"] = "elan4" if "encoder.top_down.0.mix1.conv.weight" in tensors else "elan5"
    found["gateway"] = "decoder.layers.0.cross_norm.gate.weight" in tensors
    shared = "decoder.box_heads.1.layers.0.weight" not in tensors
    found["shared_box_head"] = shared and "decoder.layers.1.feedforward.inner.weight" in tensors
    projects = "proposals.projection.weight" in tensors
    found["implementation"] = "transformers" if projects else "official"
    return found


def unseen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says and tensors do not show; empty settings: an official checkpoint."""
    return d_fine.unseen(settings) | dinov3.unseen(settings)


_PUBLISHED: Mapping[int, tuple[str, int, int]] = {
    64: ("Atto", 320, 100),
    96: ("Femto", 416, 150),
    112: ("Pico", 640, 200),
}
"""Width of sizes with the lite encoder -> name, side of images, queries."""


def published(width: int) -> tuple[str, int, int]:
    """Name, side of images and queries of a detector with a lite encoder of this width; 0: none."""
    return _PUBLISHED.get(width, ("sizes from N on", 640, 300))


def official(
    args: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], PreprocessingConfig, list[str]]:
    """What is so as published: images and queries, which an official checkpoint does not say.

    Args:
        args: of the checkpoint; not used.
        tensors: by our names.

    Returns:
        Keys of ours, preprocessing, and what was assumed.
    """
    width = len(tensors.get("encoder.context.conv.weight", ()))
    sizes, side, queries = published(width)
    found: dict[str, Any] = {"queries": queries}
    over_vit = dinov3.is_dinov3(tensors)
    if over_vit:
        found["dinov3"] = dinov3.official(tensors)
    pixels = PreprocessingConfig(
        normalisation="imagenet" if over_vit else "unit",
        shortest_side=None,
        longest_side=None,
        exact_size=(side, side),
    )
    notes = [
        f"images of {side} x {side} and {queries} queries are assumed, as published ({sizes})",
        "silu in its heads is assumed unless --activation says otherwise, as published",
    ]
    return found, pixels, notes
