"""Every backbone by its configuration, and where backbones start from."""

from __future__ import annotations

import torch

from d3etr.config.backbones import SMALL
from d3etr.config.detector import BackboneConfig
from d3etr.detectors.small_backbone import SmallBackbone
from d3etr.detectors.torchvision_backbone import TorchvisionBackbone

Backbone = SmallBackbone | TorchvisionBackbone


def build_backbone(config: BackboneConfig) -> Backbone:
    """Build a backbone with random weights.

    Args:
        config: kind and size; ``trainable`` False freezes every parameter.
    """
    small = config.name == SMALL
    backbone = SmallBackbone(config) if small else TorchvisionBackbone(config)
    if not config.trainable:
        backbone.requires_grad_(False)
    for weight in backbone.parameters():
        if weight.dim() == 4:  # else reordered in every step, there and back
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return backbone
