"""RF-DETR (Robinson et al., arXiv 2511.09554): LW-DETR over a windowed DINOv2."""

from __future__ import annotations

from typing import Literal

from d3etr.config.backbone import BackboneConfig
from d3etr.detectors.grouped import GroupedConfig, GroupedDetector
from d3etr.detectors.projector import ChannelNorm, Norm


class RFDETRConfig(GroupedConfig):
    """RF-DETR."""

    name: Literal["rf_detr"] = "rf_detr"
    backbone: BackboneConfig = BackboneConfig(name="vit")

    @property
    def projector_norm(self) -> Norm:
        """Of the projector's convolutions."""
        return ChannelNorm


class RFDETR(GroupedDetector):
    """A windowed DINOv2 below, and a projector that norms every cell, whatever the batch.

    Args:
        config: architecture.
        classes: C.
    """

    config: RFDETRConfig
    config_class = RFDETRConfig
