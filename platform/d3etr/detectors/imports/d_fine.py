"""D-FINE's tensors by others' names, and its architecture from them.

Names are those of transformers (``d_fine``) and of the official code, which DEIM's shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d3etr.detectors.imports import rt_detr

_FUSIONS = r"^(encoder\.(?:top_down|bottom_up)\.\d+)"
RULES: tuple[tuple[str, str], ...] = (
    (r"^encoder\.(fpn|pan)_blocks\.(\d+)\.conv1\.", r"encoder.\1_blocks.\2.enter."),
    (r"^encoder\.(fpn|pan)_blocks\.(\d+)\.csp_rep([12])\.", r"encoder.\1_blocks.\2.stage\3."),
    (r"^encoder\.(fpn|pan)_blocks\.(\d+)\.conv2\.", r"encoder.\1_blocks.\2.mix1."),
    (r"^encoder\.(fpn|pan)_blocks\.(\d+)\.conv3\.", r"encoder.\1_blocks.\2.mix2."),
    (r"^encoder\.(fpn|pan)_blocks\.(\d+)\.conv4\.", r"encoder.\1_blocks.\2.leave."),
    (r"^encoder\.downsample_convs\.(\d+)\.conv1\.", r"encoder.downsamples.\1.0."),
    (r"^encoder\.downsample_convs\.(\d+)\.conv2\.", r"encoder.downsamples.\1.1."),
    (r"\.mlp\.layers\.0\.", ".fc1."),
    (r"\.mlp\.layers\.1\.", ".fc2."),
    *rt_detr.RULES,
    (_FUSIONS + r"\.stage([12])\.conv1\.", r"\1.stage\2.first."),
    (_FUSIONS + r"\.stage([12])\.conv2\.", r"\1.stage\2.shortcut."),
    (_FUSIONS + r"\.stage([12])\.conv3\.", r"\1.stage\2.last."),
    (r"^decoder\.pre_bbox_head\.", "decoder.first_box_head."),
    (r"^decoder\.lqe_layers\.(\d+)\.reg_conf\.", r"decoder.quality_heads.\1."),
    (r"\.gateway\.", ".cross_norm."),
)
"""As of ``layouts.Rules``."""

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
