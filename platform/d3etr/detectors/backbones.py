"""Every backbone by its configuration, and where backbones start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from d3etr.config.backbone import BackboneConfig
from d3etr.config.backbones import DINOV3, SMALL, TIMM, VIT, is_timm_vit
from d3etr.detectors.dinov3 import DINOv3
from d3etr.detectors.small_backbone import SmallBackbone
from d3etr.detectors.torchvision_backbone import TorchvisionBackbone
from d3etr.detectors.vit import WindowedViT

if TYPE_CHECKING:
    from d3etr.detectors.timm_backbone import TimmBackbone
    from d3etr.detectors.timm_vit import TimmViT

Backbone: TypeAlias = (
    "SmallBackbone | TorchvisionBackbone | TimmBackbone | TimmViT | WindowedViT | DINOv3"
)


@runtime_checkable
class BlockMaps(Protocol):
    """A backbone that gives maps of one stride, of several of its blocks.

    Attributes:
        map_channels: of each map.
    """

    map_channels: tuple[int, ...]

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, height, width] to [B, channels, h, w] each, of the earliest block first."""


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
    if is_timm_vit(name):
        from d3etr.detectors.timm_vit import TimmViT  # importing timm takes two seconds

        return TimmViT
    if name.startswith(TIMM):
        import d3etr.detectors.small_hgnet  # noqa: F401, importing timm takes two seconds
        from d3etr.detectors.timm_backbone import TimmBackbone

        return TimmBackbone
    return TorchvisionBackbone
