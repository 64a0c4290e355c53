"""D-FINE's tensors by others' names, and its architecture from them.

Names are those of transformers (``d_fine``) and of the official code, which DEIM's shares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from d3etr.detectors.imports import rt_detr

_STAGES = r"^(encoder\.(?:fpn|pan)_blocks\.\d+)\."
_FUSIONS = r"^(encoder\.(?:top_down|bottom_up)\.\d+)"
LAYERS: tuple[tuple[str, str], ...] = (
    (r"^encoder\.downsample_convs\.(\d+)\.(conv|0\.cv)1\.", r"encoder.downsamples.\1.0."),
    (r"^encoder\.downsample_convs\.(\d+)\.(conv|0\.cv)2\.", r"encoder.downsamples.\1.1."),
    (r"\.mlp\.layers\.0\.", ".fc1."),
    (r"\.mlp\.layers\.1\.", ".fc2."),
)
HEADS: tuple[tuple[str, str], ...] = (
    (r"^decoder\.pre_bbox_head\.", "decoder.first_box_head."),
    (r"^decoder\.lqe_layers\.(\d+)\.reg_conf\.", r"decoder.quality_heads.\1."),
    (r"\.gateway\.", ".cross_norm."),
)
RULES: tuple[tuple[str, str], ...] = (
    (_STAGES + r"(conv|cv)1\.", r"\1.enter."),
    (_STAGES + r"(csp_rep1|cv2\.0)\.", r"\1.stage1."),
    (_STAGES + r"(csp_rep2|cv3\.0)\.", r"\1.stage2."),
    (_STAGES + r"(conv2|cv2\.1)\.", r"\1.mix1."),
    (_STAGES + r"(conv3|cv3\.1)\.", r"\1.mix2."),
    (_STAGES + r"(conv|cv)4\.", r"\1.leave."),
    *LAYERS,
    *rt_detr.RULES,
    (_FUSIONS + r"\.stage([12])\.conv1\.", r"\1.stage\2.first."),
    (_FUSIONS + r"\.stage([12])\.conv2\.", r"\1.stage\2.shortcut."),
    (_FUSIONS + r"\.stage([12])\.conv3\.", r"\1.stage\2.last."),
    *HEADS,
)
"""As of ``layouts.Rules``; ``LAYERS`` and ``HEADS`` are DEIMv2's, too."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    **rt_detr.ONLY,
    "decoder_method": ("default",),
    "top_prob_values": (4,),
    "lqe_hidden_dim": (64,),
    "lqe_layers": (2,),
    "layer_scale": (1, 1.0),
    "eval_idx": (-1,),
}
"""Settings of ``config.json`` that our detector has."""
BINS = ("decoder.up", "decoder.reg_scale")
"""Tensors of theirs that are settings of ours: bound and curvature."""
_MOST = 65_536
"""Numbers that are read of a tensor."""
_POINTS = ".num_points_scale"
"""End of the name of a tensor of theirs: 1 / P for each of a level's P places, level by level."""


def told(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of ours that are tensors of theirs: bound, curvature and points of each level.

    They count, whatever a ``config.json`` says: theirs computes with them.

    Raises:
        ValueError: one is missing or no such thing.
    """
    found: dict[str, Any] = {}
    for key, end in zip(("bound", "curvature"), BINS, strict=True):
        [number] = _numbers(theirs, end, 1)
        found[key] = abs(float(str(np.float32(number))))  # 0.3, of which float32 keeps 0.30000001
    found["points"] = _points(_numbers(theirs, _POINTS))
    return found


def _numbers(theirs: Mapping[str, Tensor], end: str, count: int | None = None) -> list[float]:
    """What the first tensor whose name ends so holds."""
    name = next((name for name in theirs if name.endswith(end)), None)
    if name is None:
        raise ValueError(f"no tensor '...{end}'")
    numbers: list[float] = theirs[name].flatten()[:_MOST].tolist()
    if not numbers or (count is not None and len(numbers) != count):
        raise ValueError(f"'{name}' has shape {list(theirs[name].shape)}")
    return numbers


def _points(scales: list[float]) -> tuple[int, ...]:
    """P of each level, of which 1 / P comes P times."""
    points: list[int] = []
    while (start := sum(points)) < len(scales):
        scale = scales[start]
        count = round(1 / scale) if 1 / _MOST <= scale <= 1 else 0
        if not count or scales[start : start + count] != [scale] * count:
            raise ValueError(f"'...{_POINTS}' is no 1 / P for each of a level's P places")
        points.append(count)
    return tuple(points)


def architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tensors by our names show; nothing of one that is missing."""
    found = rt_detr.architecture(tensors)
    found["levels"] = sum(
        re.fullmatch(r"encoder\.projections\.\d+\.conv\.weight", name) is not None
        for name in tensors
    )
    if (within := tensors.get("encoder.top_down.0.stage1.first.conv.weight")) is not None:
        found["expansion"] = _expansion(len(within), found.get("encoder_width", 1))
        block = r"encoder\.top_down\.0\.stage1\.blocks\.\d+\.wide\.conv\.weight"
        found["encoder_blocks"] = sum(re.fullmatch(block, name) is not None for name in tensors)
    if (corners := tensors.get("decoder.box_heads.0.layers.2.bias")) is not None:
        found["bins"] = len(corners) // 4 - 1
    return found


def _expansion(within: int, width: int) -> float:
    """The factor on half of the encoder's width that gives channels within its fusions."""
    expansion = 2 * within / width
    # What is rounded off must not cost a channel.
    return expansion if round(expansion * width // 2) == within else math.nextafter(expansion, 9)


def unseen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says and tensors do not show; empty settings: an official checkpoint."""
    return rt_detr.denoising(settings)
