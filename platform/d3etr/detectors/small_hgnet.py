"""HGNetV2 in three sizes below B0, of which timm has none: Atto, Femto and Pico of DEIMv2.

Importing this module makes them ``timm/hgnetv2_atto``, ``_femto`` and ``_pico``: timm's network
without its last stage (Huang et al., arXiv 2509.20787). There are no weights of ImageNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import register_model
from timm.models.hgnet import HighPerfGpuNet

from d3etr.errors import UserError

_FIRST = {
    "stem_type": "v2",
    "stem_chs": [16, 16],
    "stage1": [16, 16, 64, 1, False, False, 3, 3],
    "stage2": [64, 32, 256, 1, True, False, 3, 3],
}
SMALL_SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "atto": {**_FIRST, "stage3": [256, 64, 256, 1, True, True, 3, 3]},
        "femto": {**_FIRST, "stage3": [256, 64, 512, 1, True, True, 5, 3]},
        "pico": {**_FIRST, "stage3": [256, 64, 512, 2, True, True, 5, 3]},
    }
)
"""As timm's ``model_cfgs`` have the larger ones: input, inner and output channels of a stage,
blocks, whether it halves the map, whether layers are light, kernel, layers of a block."""
_STAGES = 3


class SmallHGNet(HighPerfGpuNet):
    """Timm's network of three stages.

    Args:
        size: a key of ``SMALL_SIZES``.
        settings: of timm's network.
    """

    def __init__(self, size: str, **settings: Any) -> None:
        stages = SMALL_SIZES[size]
        # Timm's constructor asks for four; the last is not kept.
        last = [stages["stage3"][2], 8, 8, 1, True, True, 3, 1]
        super().__init__({**stages, "stage4": last}, use_lab=True, **settings)
        self.pretrained_cfg = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        self.stages = self.stages[:_STAGES]
        self.feature_info = self.feature_info[:_STAGES]


def _build(size: str, pretrained: bool) -> SmallHGNet:
    if pretrained:
        raise UserError(
            f"there are no weights of ImageNet for timm/hgnetv2_{size}: leave "
            "student.backbone_weights out, or begin with a checkpoint of DEIMv2 "
            "(student.initialise_from)"
        )
    return SmallHGNet(size, num_classes=0, global_pool="")


@register_model
def hgnetv2_atto(pretrained: bool = False, **_: Any) -> SmallHGNet:
    """The smallest."""
    return _build("atto", pretrained)


@register_model
def hgnetv2_femto(pretrained: bool = False, **_: Any) -> SmallHGNet:
    """A wider last stage."""
    return _build("femto", pretrained)


@register_model
def hgnetv2_pico(pretrained: bool = False, **_: Any) -> SmallHGNet:
    """B0 without its last stage."""
    return _build("pico", pretrained)
