"""LW-DETR (Chen et al., arXiv 2406.03459)."""

from __future__ import annotations

from typing import Literal

from d3etr.config.backbone import BackboneConfig
from d3etr.config.vit import ViTConfig
from d3etr.detectors.batch_norm import BatchNorm2d
from d3etr.detectors.grouped import GroupedConfig, GroupedDetector
from d3etr.detectors.projector import Norm

TINY = ViTConfig(
    kind="lw_detr",
    width=192,
    blocks=10,
    heads=12,
    windows=4,
    whole=(2, 4, 5, 8),
    outputs=(3, 5, 6, 10),
    positions=14,
)
"""The backbone of LW-DETR small."""


class LWDETRConfig(GroupedConfig):
    """LW-DETR."""

    name: Literal["lw_detr"] = "lw_detr"
    backbone: BackboneConfig = BackboneConfig(name="vit", vit=TINY)

    @property
    def projector_norm(self) -> Norm:
        """Of the projector's convolutions."""
        return BatchNorm2d


class LWDETR(GroupedDetector):
    """A plain vision transformer below, and batch norm in its projector.

    Args:
        config: architecture.
        classes: C.
    """

    config: LWDETRConfig
    config_class = LWDETRConfig
