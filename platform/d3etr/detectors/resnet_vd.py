"""ResNet-vd: ResNets with three small convolutions as a stem, and shortcuts that pool.

He et al., "Bag of tricks for image classification" (2019), ResNet-D; as PaddleDetection and RT-DETR
have it. On torchvision's network, so that what is done to its blocks (frozen norms, freezing) is
done to these. Names are timm's of its ``resnet50d`` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

STEM = 64
"""Channels of the stem's last convolution; the two before it have half of them."""
_KINDS: Mapping[str, tuple[type[Any], tuple[int, ...]]] = MappingProxyType(
    {
        "resnet18vd": (BasicBlock, (2, 2, 2, 2)),
        "resnet34vd": (BasicBlock, (3, 4, 6, 3)),
        "resnet50vd": (Bottleneck, (3, 4, 6, 3)),
        "resnet101vd": (Bottleneck, (3, 4, 23, 3)),
    }
)
"""Block, and how many each stage has."""
_SHORTCUT = "layer1.0.downsample."
"""Beside the first block; timm's networks of basic blocks have no convolution there."""


class ResNetVd(ResNet):  # type: ignore[misc]
    """Torchvision's ResNet with ResNet-vd's stem and shortcuts.

    Every stage begins with a block that has a convolution beside it: behind a 2x2 average where
    the stage halves the map (rounding up), alone in the first stage. Strides are of 3x3
    convolutions.

    Args:
        block: torchvision's of the network.
        blocks: how many each of the four stages has.
    """

    def __init__(self, block: type[Any], blocks: Sequence[int]) -> None:
        super().__init__(block, [*blocks])
        self.conv1 = nn.Sequential(
            *_layer(3, STEM // 2, 3, 2),
            nn.ReLU(inplace=True),
            *_layer(STEM // 2, STEM // 2, 3),
            nn.ReLU(inplace=True),
            _layer(STEM // 2, STEM, 3)[0],
        )
        inputs = STEM
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            first, outputs = stage[0], stage[0].conv1.out_channels * block.expansion
            pool = nn.AvgPool2d(2, 2, ceil_mode=True) if first.stride == 2 else nn.Identity()
            first.downsample = nn.Sequential(pool, *_layer(inputs, outputs, 1))
            inputs = outputs


def _layer(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Conv2d, nn.Module]:
    """A convolution, as torchvision's ResNet starts its own, and its norm."""
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution, nn.BatchNorm2d(outputs)


def build_resnet_vd(name: str) -> ResNetVd:
    """A whole network with random weights, on the default device.

    Args:
        name: ``resnet50vd`` and so on.
    """
    return ResNetVd(*_KINDS[name])


def with_first_shortcut(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a ResNet-vd, or of timm's ResNet-D, which is one without the first shortcut.

    Where its convolution is missing beside basic blocks, it becomes the identity: the network gives
    what timm's gives.

    Args:
        name: ``resnet50vd`` and so on.
        tensors: by timm's names.
    """
    block, _ = _KINDS[name]
    if block is not BasicBlock or any(key.startswith(_SHORTCUT) for key in tensors):
        return dict(tensors)
    ones, zeros = torch.ones(STEM), torch.zeros(STEM)
    variance = ones - nn.BatchNorm2d(1).eps  # its root is taken of both
    norm = {"weight": ones, "bias": zeros, "running_mean": zeros, "running_var": variance}
    kernel = torch.eye(STEM)[:, :, None, None]
    return {
        **tensors,
        f"{_SHORTCUT}1.weight": kernel,
        **{f"{_SHORTCUT}2.{key}": tensor.clone() for key, tensor in norm.items()},
    }
