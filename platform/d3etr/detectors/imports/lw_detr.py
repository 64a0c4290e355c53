"""Official LW-DETRs: names of their vision transformers, and what tensors do not show.

The rest of their names is RF-DETR's, whose code began as theirs (Atten4Vis/LW-DETR).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from d3etr.config.data import PreprocessingConfig
from d3etr.detectors.imports.grouped import SCALES, assumed, official_heads

SIGN = "backbone.0.encoder.blocks.0.attn.q_bias"
"""As of ``layouts.Layout``: only their attention has such a tensor."""
_BLOCK = r"^(backbone\.blocks\.\d+)\.attn\."
RULES: tuple[tuple[str, str], ...] = (
    (r"^backbone\.0\.encoder\.(?=blocks\.|pos_embed|patch_embed\.)", "backbone."),
    (r"^backbone\.pos_embed$", "backbone.positions"),
    (r"^backbone\.patch_embed\.proj\.", "backbone.patches."),
    (_BLOCK + r"q_bias$", r"\1.query.bias"),
    (_BLOCK + r"v_bias$", r"\1.value.bias"),
    (_BLOCK + r"proj\.", r"\1.output."),
    (_BLOCK, r"\1.attention."),
)
"""As of ``layouts.Rules``, before those of ``grouped``; queries, keys and values are apart."""
ONLY_ARGS: Mapping[str, tuple[Any, ...]] = {
    "two_stage": (True,),
    "bbox_reparam": (True,),
    "lite_refpoint_refine": (True,),
    "decoder_norm": ("LN",),
}
"""Settings of official ``args`` that our detector has."""
_PUBLISHED = {6: ((1, 3, 5), (0, 2, 4)), 10: ((2, 4, 5, 9), (0, 1, 3, 6, 7, 9))}
"""Blocks of tiny, and of the other sizes: which of them, from 0, are read and have windows."""
_HEADS, _WINDOWS, SIDE = 12, 4, 640
"""Heads of their vision transformers, windows along each side, and pixels of images' sides."""


def official(
    args: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], PreprocessingConfig, list[str]]:
    """What an official LW-DETR was trained with; what its arguments leave out is as published.

    Args:
        args: of the checkpoint; may be empty.
        tensors: by our names.

    Returns:
        Keys of the configuration, what is done to images (squares), and what was assumed.

    Raises:
        ValueError: a tensor that shows one of them is missing, or nothing does.
    """
    if "decoder.norm.weight" not in tensors:
        raise ValueError("no tensor 'decoder.norm.weight' (by our names)")
    width = len(tensors["decoder.norm.weight"])
    numbers = {int(name.split(".")[2]) for name in tensors if name.startswith("backbone.blocks.")}
    blocks = len(numbers)
    read, within = _PUBLISHED.get(blocks, (None, None))
    read = args.get("out_feature_indexes") or read
    within = args.get("window_block_indexes") or within
    if read is None or within is None:
        raise ValueError(
            f"its args do not say out_feature_indexes and window_block_indexes, and none of the "
            f"published LW-DETRs has {blocks} blocks"
        )
    outputs = tuple(sorted(k % blocks + 1 for k in read))  # from 0, or from the end below it
    vit = {
        "heads": _HEADS,
        "windows": _WINDOWS,
        "outputs": outputs,
        "whole": tuple(k for k in range(outputs[-1]) if k not in within),
    }
    found = {
        **official_heads(args, width),
        "scales": _scales(args.get("projector_scale"), tensors),
        "vit": vit,
    }
    pixels = PreprocessingConfig(shortest_side=None, longest_side=None, exact_size=(SIDE, SIDE))
    expected = ("sa_nheads", "ca_nheads", "out_feature_indexes", "window_block_indexes")
    published = f"the LW-DETR of {blocks} blocks and width {width} was published with"
    return found, pixels, assumed(args, (*expected, "projector_scale"), published)


def _scales(levels: str | list[str] | None, tensors: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Resolutions of the feature levels, of as many as tensors show where nothing says them."""
    if levels is None:
        levels = ["P3", "P5"] if "encoder.levels.1.norm.weight" in tensors else ["P4"]
    levels = [levels] if isinstance(levels, str) else levels
    if unknown := [level for level in levels if level not in SCALES]:
        raise ValueError(f"projector_scale has {unknown[0]}: expected some of {', '.join(SCALES)}")
    return tuple(SCALES[level] for level in levels)
