"""Every backbone by its configuration, and where backbones start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from d3etr.config.backbones import DINOV3, SMALL, TIMM, VIT
from d3etr.config.detector import BackboneConfig
from d3etr.detectors.dinov3 import DINOv3
from d3etr.detectors.small_backbone import SmallBackbone
from d3etr.detectors.torchvision_backbone import TorchvisionBackbone
from d3etr.detectors.vit import WindowedViT

if TYPE_CHECKING:
    from d3etr.detectors.timm_backbone import TimmBackbone

Backbone: TypeAlias = "SmallBackbone | TorchvisionBackbone | TimmBackbone | WindowedViT | DINOv3"


def build_backbone(config: BackboneConfig) -> Backbone:
    """Build a backbone with random weights.

    Args:
        config: kind and size; ``trainable`` False freezes every parameter.
    """
    backbone = _kind_of(config.name)(config)
    if not config.trainable:
        backbone.requires_grad_(False)
    store_channels_last(backbone)
    return backbone


def store_channels_last(module: nn.Module) -> None:
    """Order convolutions' weights as maps are stored: else every step does so, there and back."""
    for weight in module.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _kind_of(name: str) -> type[Backbone]:
    if name == SMALL:
        return SmallBackbone
    if name == VIT:
        return WindowedViT
    if name == DINOV3:
        return DINOv3
    if name.startswith(TIMM):
        import d3etr.detectors.small_hgnet  # noqa: F401, importing timm takes two seconds
        from d3etr.detectors.timm_backbone import TimmBackbone

        return TimmBackbone
    return TorchvisionBackbone
