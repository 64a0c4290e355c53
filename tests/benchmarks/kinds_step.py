"""A plain training step of RT-DETR, D-FINE and RF-DETR beside Hugging Face's, weights imported.

Theirs has random weights and is saved as a folder; ours is what ``d3etr import-weights`` makes of
it. Denoising queries and copies of queries are in both, batch norm of backbones is frozen in both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.plain_step import TheirStep, require_as_many, side_by_side
from benchmarks.problems import CLASSES, random_batch
from benchmarks.side_by_side import Comparison, Scale
from d3etr.config.detector import DetectorConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.weights import load_weights

SIDE = 320
"""Pixels on a CPU, where a step at 640 takes four times as long."""


def compare(scale: Scale) -> list[Comparison]:
    """Images per second of both, for each kind."""
    on_cpu = scale.device.type == "cpu" and not scale.smoke
    side = replace(scale, image=SIDE if on_cpu else scale.image, larger=None)
    return [_compare(side, title, build) for title, build in KINDS.items()]


def _compare(scale: Scale, title: str, build: Callable[[Scale], Any]) -> Comparison:
    torch.manual_seed(0)
    theirs = build(scale)
    ours = imported(theirs)
    _train_what_is_read(theirs, ours, scale)
    trained = require_as_many(theirs, ours)
    return side_by_side(scale, f"{title}, {scale.queries} queries", theirs, ours, trained, 1.1)


def imported(theirs: Any) -> DetectionTransformer:
    """Ours with the same weights; of RT-DETR's boxes one layer learns, as theirs."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(f"{folder}/theirs")
        file = Path(folder) / "ours.safetensors"
        import_weights(Path(folder) / "theirs", file)
        detector = load_weights(file)[0]
    if "look_forward_twice" not in type(detector.config).model_fields:
        return detector
    settings = detector.config.model_dump(mode="json") | {"look_forward_twice": False}
    once = build_detector(DetectorConfig.parse(settings), CLASSES)
    once.load_state_dict(detector.state_dict())
    return once


def _train_what_is_read(theirs: nn.Module, ours: nn.Module, scale: Scale) -> None:
    """Train all of ours, and all of theirs but blocks that nothing reads and D-FINE's constants."""
    for model in (theirs, ours):
        model.requires_grad_(True)
    TheirStep(theirs, scale, random_batch(scale)).backward()
    for name, parameter in theirs.named_parameters():
        constant = name.endswith((".up", ".reg_scale"))
        parameter.requires_grad_(parameter.grad is not None and not constant)
        parameter.grad = None


def _rt_detr(scale: Scale) -> nn.Module:
    import transformers

    depths, hidden = ([2, 2, 2, 2], [64, 128, 256, 512])
    config = transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(
            depths=depths,
            hidden_sizes=hidden,
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_in_channels=hidden[1:],
        decoder_layers=3,
        hidden_expansion=0.5,
        num_queries=scale.queries,
        num_labels=CLASSES,
        **(SMALL if scale.smoke else {}),
    )
    return transformers.RTDetrForObjectDetection(config)


def _d_fine(scale: Scale) -> nn.Module:
    import transformers

    config = transformers.DFineConfig(
        backbone_config=transformers.HGNetV2Config(
            out_features=["stage2", "stage3", "stage4"], **HGNET_B0
        ),
        encoder_in_channels=HGNET_B0["stage_out_channels"][1:],
        decoder_layers=3,
        decoder_n_points=[3, 6, 3],
        hidden_expansion=0.5,
        depth_mult=0.34,
        num_queries=scale.queries,
        num_labels=CLASSES,
        **(SMALL if scale.smoke else {}),
    )
    return transformers.DFineForObjectDetection(config)


SMALL: dict[str, Any] = {
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32] * 3,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
"""Widths that only show that it works."""
HGNET_B0: dict[str, Any] = {
    "depths": [1, 1, 2, 1],
    "stem_channels": [3, 16, 16],
    "stage_in_channels": [16, 64, 256, 512],
    "stage_mid_channels": [16, 32, 64, 128],
    "stage_out_channels": [64, 256, 512, 1024],
    "hidden_sizes": [64, 256, 512, 1024],
    "stage_num_blocks": [1, 1, 2, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [3, 3, 3, 3],
    "use_learnable_affine_block": True,
}


def _rf_detr(scale: Scale) -> nn.Module:
    """Nano's: DINOv2-S in windows, two decoder layers, one level; 13 copies of the queries."""
    import transformers

    config = transformers.RfDetrConfig(
        backbone_config={
            "model_type": "rf_detr_dinov2",
            "hidden_size": 48 if scale.smoke else 384,
            "num_attention_heads": 6,
            "num_hidden_layers": 12,
            "num_register_tokens": 0,
            "patch_size": 16,
            "image_size": 384,
            "num_windows": 2,
            "out_indices": [3, 6, 9, 12],
        },
        decoder_layers=2,
        dropout=0.0,
        num_queries=scale.queries,
        num_labels=CLASSES,
    )
    return transformers.RfDetrForObjectDetection(config)


KINDS: dict[str, Callable[[Scale], nn.Module]] = {
    "RT-DETR R18": _rt_detr,
    "D-FINE S": _d_fine,
    "RF-DETR N": _rf_detr,
}
