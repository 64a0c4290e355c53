"""Detectors that are small enough for unit tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d3etr.config.data import DataConfig
from d3etr.config.detector import DetectorConfig

FAMILY: dict[str, dict[str, Any]] = {
    "detr": {"name": "detr"},
    "detr-softmax": {"name": "detr", "classification": "softmax"},
    "conditional_detr": {"name": "conditional_detr"},
    "dab_detr": {"name": "dab_detr"},
    "deformable_detr": {"name": "deformable_detr", "levels": 2, "points": 2},
    "deformable-refined": {
        "name": "deformable_detr",
        "levels": 2,
        "points": 2,
        "box_refinement": True,
    },
    "deformable-two-stage": {
        "name": "deformable_detr",
        "levels": 2,
        "points": 2,
        "box_refinement": True,
        "two_stage": True,
    },
    "rt_detr": {
        "name": "rt_detr",
        "levels": 2,
        "points": 2,
        "encoder_width": 24,
        "encoder_feedforward": 16,
        "expansion": 0.5,
    },
    "d_fine": {
        "name": "d_fine",
        "levels": 2,
        "points": [2, 3],
        "encoder_width": 24,
        "encoder_feedforward": 16,
        "expansion": 0.5,
        "encoder_blocks": 1,
        "bins": 8,
    },
    "deimv2": {
        "name": "deimv2",
        "levels": 2,
        "points": [2, 3],
        "encoder_width": 24,
        "encoder_feedforward": 16,
        "expansion": 0.5,
        "encoder_blocks": 1,
        "bins": 8,
    },
    "deimv2-lite": {
        "name": "deimv2",
        "encoder": "lite",
        "encoder_layers": 0,
        "levels": 2,
        "points": [2, 3],
        "encoder_width": 16,
        "expansion": 0.5,
        "encoder_blocks": 1,
        "bins": 8,
        "fusion": "elan4",
        "gateway": False,
        "shared_box_head": True,
        "implementation": "transformers",
    },
    "lw_detr": {
        "name": "lw_detr",
        "encoder_layers": 0,
        "cross_heads": 4,
        "scales": [2.0, 1.0],
        "projector_blocks": 1,
        "groups": 2,
    },
    "rf_detr": {
        "name": "rf_detr",
        "backbone": {
            "name": "vit",
            "vit": {
                "width": 16,
                "blocks": 2,
                "heads": 2,
                "expansion": 2,
                "patch": 8,
                "whole": [1],
                "outputs": [1, 2],
                "positions": 3,
            },
        },
        "encoder_layers": 0,
        "cross_heads": 4,
        "projector_blocks": 1,
        "groups": 3,
    },
    "dino": {"name": "dino", "levels": 2, "points": 2},
}
"""What tells the detectors of the family apart, by name of the variant."""
REPRESENTATIVES = (
    "detr-softmax",
    "conditional_detr",
    "deformable-two-stage",
    "d_fine",
    "rf_detr",
    "dino",
)
"""One of each way to have classes, queries, levels and groups: for what all kinds share, in as many
variants as all together would take too long."""


def tiny_detector_config(**changes: Any) -> DetectorConfig:
    """By default a Conditional DETR of 16 channels; keyword arguments change its architecture."""
    settings: dict[str, Any] = {
        "backbone": {"name": "small", "stem_width": 8, "stage_widths": (8, 8, 16)},
        "width": 16,
        "heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "feedforward": 16,
        "queries": 5,
        "dropout": 0.0,
    }
    return DetectorConfig.parse(settings | changes)


def changed(config: DetectorConfig, **changes: Any) -> DetectorConfig:
    """The same architecture with other values, of the class that a changed ``name`` stands for."""
    return DetectorConfig.parse(config.model_dump(mode="json") | changes)


def save_untrained(path: Path, config: DetectorConfig, data: DataConfig, **info: Any) -> None:
    """Weights file of a detector of the data's classes; ``info`` replaces what it says.

    Its boxes are not those that a student begins with: where both are equal, rounding alone would
    decide the sign of an L1 loss's gradient.
    """
    import torch

    from d3etr.data.splits import open_split
    from d3etr.detectors.build import build_detector
    from d3etr.detectors.weights import WeightsInfo, save_weights

    split = open_split(data, "train")
    torch.default_generator.manual_seed(7)
    fields: dict[str, Any] = {
        "detector": config,
        "categories": tuple((c.id, c.name) for c in split.categories),
        "preprocessing": data.preprocessing,
    }
    detector = build_detector(config, len(split.categories))
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if name.startswith("box_head"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_weights(path, detector, WeightsInfo(**(fields | info)))
