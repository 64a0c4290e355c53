"""HGNetV2's tensors by others' names as those of timm's network, which computes the same.

Names are those of transformers (``hgnet_v2``) and of D-FINE's repository (``HGNetv2``), whose
modules are called as timm's. Sizes B0 to B3 have learnable affine blocks in timm; where others have
none, blocks of timm's that change nothing stand in for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from d3etr.errors import UserError

OURS = "backbone.network."
"""Beginning of a backbone's names in a detector; timm's own follow."""
RULES: tuple[tuple[str, str], ...] = (
    (r"^backbone\.(embedder|stem)\.", rf"{OURS}stem."),
    (r"^backbone\.(encoder\.)?stages\.", rf"{OURS}stages."),
    (r"^(backbone\.network\..*)\.convolution\.", r"\1.conv."),
    (r"^(backbone\.network\..*)\.normalization\.", r"\1.bn."),
)
"""As of ``layouts.Rules``, of names that begin with ``backbone.`` already."""
_SIGN = re.compile(r"(^|\.)(embedder|stem)\.stem2a\.conv(olution)?\.weight")
_SIZES: Mapping[tuple[int, int, tuple[int, ...]], int] = {
    (16, 3, (1, 1, 2, 1)): 0,
    (24, 3, (1, 1, 2, 1)): 1,
    (24, 4, (1, 1, 3, 1)): 2,
    (24, 5, (1, 1, 3, 1)): 3,
    (32, 6, (1, 1, 3, 1)): 4,
    (32, 6, (1, 2, 5, 2)): 5,
    (48, 6, (2, 3, 6, 3)): 6,
}
"""Channels of the first convolution, layers of a block and blocks of each stage -> B0 to B6."""
_SMALL: Mapping[tuple[tuple[int, ...], int], str] = {
    ((1, 1, 1, 0), 256): "atto",
    ((1, 1, 1, 0), 512): "femto",
    ((1, 1, 2, 0), 512): "pico",
}
"""Blocks of each stage and channels of the third -> sizes without a fourth, which begin as B0."""
AFFINE = (16, 24)
"""Channels of the first convolution of sizes whose activations learn a scale and a shift."""
_WITHOUT_ACTIVATION = re.compile(r"(\.downsample|\.layers\.\d+\.conv1)\.bn\.weight$")
"""Norms behind which there is neither; light layers have two convolutions."""
ONLY: Mapping[str, tuple[Any, ...]] = {
    "stem_strides": ([2, 1, 1, 2, 1],),
    "stage_downsample_strides": ([2, 2, 2, 2],),
}
"""Settings of ``backbone_config`` that tensors do not show and that timm's network has."""


def is_hgnet(names: Mapping[str, Tensor]) -> bool:
    """Whether names of others are, or contain, those of an HGNetV2."""
    return any(map(_SIGN.search, names))


def name_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Our name of the HGNetV2 that a detector's tensors, by our names, contain, if any.

    Raises:
        UserError: of a size that does not exist.
    """
    stem = tensors.get(f"{OURS}stem.stem1.conv.weight")
    if stem is None:
        return None
    found = [re.match(r"stages\.(\d)\.blocks\.(\d+)\.", x.removeprefix(OURS)) for x in tensors]
    places = {(int(match[1]), int(match[2])) for match in found if match}
    blocks = tuple(len({b for s, b in places if s == stage}) for stage in range(4))
    layers = len({x for x in tensors if re.search(r"stages\.0\.blocks\.0\.layers\.\d+\.conv\.", x)})
    size = _SIZES.get((len(stem), layers, blocks))
    if not blocks[3] and (small := _small(tensors, blocks)) is not None:
        return small
    if size is None or (_affine(tensors) and len(stem) not in AFFINE):
        kind = " and learnable affine blocks" if _affine(tensors) else ""
        raise UserError(
            f"the backbone is an HGNetV2 of {len(stem)} channels in its first convolution, "
            f"{layers} layers in a block, {blocks} blocks in its four stages{kind}: expected one "
            "of the sizes B0 to B6, of which B0 to B3 have learnable affine blocks"
        )
    return f"timm/hgnetv2_b{size}"


def _small(tensors: Mapping[str, Tensor], blocks: tuple[int, ...]) -> str | None:
    """The name of a network of three stages."""
    last = tensors.get(f"{OURS}stages.2.blocks.0.aggregation.1.conv.weight", ())
    size = _SMALL.get((blocks, len(last)))
    return None if size is None else f"timm/hgnetv2_{size}"


def with_affine_blocks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an HGNetV2, by our names, as timm's network of that size has them.

    What has no learnable affine blocks where timm's has gets those that change nothing.
    """
    stem = tensors.get(f"{OURS}stem.stem1.conv.weight")
    if stem is None or len(stem) not in AFFINE or _affine(tensors):
        return dict(tensors)
    places = [
        name.removesuffix("bn.weight") + "lab."
        for name in tensors
        if name.startswith(OURS)
        and name.endswith(".bn.weight")
        and not _WITHOUT_ACTIVATION.search(name)
    ]
    values = {"scale": torch.ones(1), "bias": torch.zeros(1)}
    blocks = {place + key: x.clone() for place in places for key, x in values.items()}
    return {**tensors, **blocks}


def _affine(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(OURS) and name.endswith(".lab.scale") for name in tensors)
