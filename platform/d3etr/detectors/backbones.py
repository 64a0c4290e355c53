"""Backbones: torchvision ResNets and the small GroupNorm network, and where they start from."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from d3etr.config.detector import BackboneConfig
from d3etr.detectors.small_backbone import SmallBackbone
from d3etr.detectors.tensor_files import load_strictly, read_tensors
from d3etr.errors import UserError

RESNET_STAGES = ("conv1", "layer1", "layer2", "layer3", "layer4")


class FusedFrozenBatchNorm2d(FrozenBatchNorm2d):  # type: ignore[misc]
    """Frozen batch norm in one kernel and without keeping anything but its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift [B, C, h, w] by the frozen statistics."""
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


class ResNetBackbone(nn.Module):
    """A torchvision ResNet without its classifier; weight names are torchvision's.

    Args:
        config: uses name, dilation, norm and frozen_stages.

    Attributes:
        config: what it was built from.
        channels: channels of the output.
        stride: pixels per output cell: 32, or 16 with dilation (DC5).
        stage_channels: channels of each stage's output.
        stage_strides: pixels per cell of each stage's output.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        norm = FusedFrozenBatchNorm2d if config.norm == "frozen" else _group_norm
        resnet = torchvision.models.get_model(config.name, weights=None, norm_layer=norm)
        self.channels: int = resnet.fc.in_features
        self.stride = 16 if config.dilation else 32
        self.stage_channels = tuple(self.channels // 2**k for k in (3, 2, 1, 0))
        self.stage_strides = (4, 8, 16, self.stride)
        self.conv1, self.bn1, self.relu = resnet.conv1, resnet.bn1, resnet.relu
        self.maxpool = resnet.maxpool
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4
        if config.dilation:
            _dilate(self.layer4)
        for name in RESNET_STAGES[: config.frozen_stages]:
            self.get_submodule(name).requires_grad_(False)
        if config.frozen_stages:
            self.bn1.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, channels, ceil(height / stride), ceil(width / stride)]."""
        return self.pyramid(pixels, 1)[0]

    def pyramid(self, pixels: Tensor, count: int) -> list[Tensor]:
        """Feature maps [B, channels, h, w] of the last ``count`` stages, finest first."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(self.relu(self.bn1(self.conv1(pixels))))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps[-count:]


def _dilate(stage: nn.Module) -> None:
    """Trade a stage's stride for dilation: DC5, for basic blocks too (torchvision refuses those).

    As in torchvision, the first block keeps dilation 1: its input has not been strided.
    """
    for name, module in stage.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        module.stride = (1, 1)
        if not name.startswith("0.") and module.kernel_size == (3, 3):
            module.dilation = module.padding = (2, 2)


def build_backbone(config: BackboneConfig) -> SmallBackbone | ResNetBackbone:
    """Build a backbone with random weights.

    Args:
        config: kind and size; ``trainable`` False freezes every parameter.
    """
    backbone = SmallBackbone(config) if config.name == "small" else ResNetBackbone(config)
    if not config.trainable:
        backbone.requires_grad_(False)
    return backbone


def load_backbone_weights(backbone: SmallBackbone | ResNetBackbone, source: str | Path) -> None:
    """Start a backbone from ImageNet or from a file of pre-training.

    Args:
        backbone: changed in place.
        source: ``imagenet``, or a safetensors file that holds the backbone's tensors by name.

    Raises:
        UserError: weights can't be had, or tensors are missing, left over or of another shape.
    """
    if str(source) == "imagenet":
        tensors = _imagenet_weights(backbone.config)
        label = f"torchvision's ImageNet weights ({backbone.config.name})"
    else:
        tensors, label = read_tensors(Path(source)), str(source)
    load_strictly(backbone, tensors, label)


def _imagenet_weights(config: BackboneConfig) -> dict[str, Tensor]:
    if config.name == "small" or config.norm != "frozen":
        raise UserError(
            f"backbone_weights 'imagenet' does not fit backbone '{config.name}' with norm "
            f"'{'group' if config.name == 'small' else config.norm}': torchvision has ImageNet "
            "weights for ResNets with batch norm. Set backbone.norm to 'frozen' and a ResNet's "
            "name, or give a file that 'd3etr pretrain-backbone' wrote."
        )
    weights = torchvision.models.get_model_weights(config.name)["IMAGENET1K_V1"]
    try:
        tensors: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"backbone_weights 'imagenet': could not download {weights.url} ({error}). Download "
            f"it elsewhere and put it into {folder}, or set backbone_weights to the path of a "
            "file that 'd3etr pretrain-backbone' wrote."
        ) from error
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
