"""Torchvision's networks, and ResNet-vd on its ResNet, as backbones: stages before the pooling.

Shapes: B images · h, w cells of a stage's map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import VGG, ConvNeXt, DenseNet, ResNet, SwinTransformer

from d3etr.config.backbone import BackboneConfig
from d3etr.config.backbones import RESNET_VD
from d3etr.detectors.batch_norm import BatchNorm2d
from d3etr.detectors.frozen_norms import (
    FrozenNorm,
    FusedFrozenBatchNorm2d,
    NormedConv2d,
    RectifiedConvolution,
    with_frozen_norms,
)
from d3etr.detectors.resnet_vd import ResNetVd, build_resnet_vd
from d3etr.detectors.small_backbone import GroupNorm
from d3etr.errors import UserError

FIRST_STRIDE = 4
"""Of the first stage; what has a finer resolution is the stem."""
HEAD = ("permute", "avgpool", "classifier", "fc")
"""Torchvision's networks end where the first of these begins."""
ROUNDING_DOWN = (ConvNeXt, SwinTransformer, DenseNet, VGG)
"""Networks whose maps lose what is left over of an image's size."""
CHANNELS_AT_THE_END = (SwinTransformer,)
"""Networks whose maps are [B, h, w, channels]."""
_PROBE = 64
"""Side of the image that strides are measured on."""


class TorchvisionBackbone(nn.Module):
    """A torchvision network, or a ResNet-vd, without its classifier; names are torchvision's.

    The last map is what torchvision averages over the image, so that everything before that
    belongs to the backbone: Swin's last norm and EfficientNet's last 1x1 convolution do,
    ConvNeXt's last norm does not, as torchvision has it in the classifier. Maps are
    ceil(size / stride) large: networks that round down see the image padded with zeros, as
    images in a batch are. Dropping of paths (ConvNeXt, Swin, EfficientNet) is torchvision's; in
    training it draws from torch's generator, as dropout does.

    Args:
        config: uses name, dilation, norm and frozen_stages.

    Attributes:
        config: what it was built from.
        channels: channels of the output.
        stride: pixels per output cell: 32, or 16 with dilation (DC5).
        stage_channels: channels of each stage's output.
        stage_strides: pixels per cell of each stage's output, from 4 on.

    Raises:
        UserError: the installed torchvision is older than the network.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        network = build_network(config.name)
        replace_batch_norm(network, config.norm)
        for name, child in network.named_children():
            if name in HEAD:
                break
            self.add_module(name, child)
        self._rounds_down = isinstance(network, ROUNDING_DOWN)
        self._channels_at_the_end = isinstance(network, CHANNELS_AT_THE_END)
        steps: list[nn.Module] = []  # sequences one level deep are taken apart
        for child in self.children():
            steps += child if isinstance(child, nn.Sequential) else [child]
        if isinstance(network, DenseNet):
            steps.append(nn.ReLU())  # the last one is no module there
        if isinstance(network, ResNet) and config.norm == "frozen":
            end = next(k for k, step in enumerate(steps) if isinstance(step, nn.MaxPool2d))
            steps[:end] = [RectifiedConvolution(*steps[k : k + 3]) for k in range(0, end, 3)]
        channels, strides = self._measure(steps)
        # The stem has at least one step; then there is a stage for each stride from 4 on.
        stem = max(1, next(k for k, stride in enumerate(strides) if stride >= FIRST_STRIDE))
        stages = sorted({stride for stride in strides if stride >= FIRST_STRIDE})
        # Lists, not module lists: state dicts have torchvision's names alone.
        self._parts: list[list[nn.Module]] = [steps[:stem], *([] for _ in stages)]
        for step, stride in zip(steps[stem:], strides[stem:], strict=True):
            self._parts[1 + stages.index(stride)].append(step)
        last = dict(zip(strides, channels, strict=True))
        self.stage_channels = tuple(last[stride] for stride in stages)
        if config.dilation:
            _dilate(self.get_submodule("layer4"))
            stages[-1] = stages[-2]
        self.stage_strides = tuple(stages)
        self.channels, self.stride = self.stage_channels[-1], self.stage_strides[-1]
        for step in (step for part in self._parts[: config.frozen_stages] for step in part):
            step.requires_grad_(False)

    @torch.no_grad()
    def _measure(self, steps: Sequence[nn.Module]) -> tuple[list[int], list[int]]:
        """Channels after every step, and pixels per cell."""
        self.eval()  # a forward pass that draws nothing
        x = torch.zeros(1, 3, _PROBE, _PROBE, device=next(self.parameters()).device)
        channels, strides = [], []
        for step in steps:
            x = step(x)
            features = self._channels_first(x)
            channels.append(features.shape[1])
            strides.append(_PROBE // features.shape[2])
        self.train()
        return channels, strides

    def _channels_first(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self._channels_at_the_end else x

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, channels, ceil(height / stride), ceil(width / stride)]."""
        return self.pyramid(pixels, 1)[0]

    def pyramid(self, pixels: Tensor, count: int) -> list[Tensor]:
        """Feature maps [B, channels, h, w] of the last ``count`` stages, finest first."""
        height, width = pixels.shape[-2:]
        x = pixels.contiguous(memory_format=torch.channels_last)
        if self._rounds_down:
            x = functional.pad(x, (0, -width % self.stride, 0, -height % self.stride))
        maps = []
        for steps, stride in zip(self._parts, (1, *self.stage_strides), strict=True):
            for step in steps:
                x = step(x)
            rows, columns = -(-height // stride), -(-width // stride)
            maps.append(self._channels_first(x)[..., :rows, :columns])
        return maps[-count:]


def build_network(name: str) -> nn.Module:
    """Torchvision's whole network, or a ResNet-vd, with random weights, on the default device.

    Raises:
        UserError: the installed torchvision is older than the network.
    """
    if name in RESNET_VD:
        return build_resnet_vd(name)
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(
            f"torchvision {torchvision.__version__} has no '{name}': install a newer torchvision, "
            "or choose another student.detector.backbone.name"
        )
    if not name.startswith("regnet"):
        network: nn.Module = torchvision.models.get_model(name, weights=None)
        return network
    with torch.device("cpu"):  # they compute their widths with tensors, which meta has not
        regnet: nn.Module = torchvision.models.get_model(name, weights=None)
    return regnet.to(torch.get_default_device())


def replace_batch_norm(network: nn.Module, norm: str) -> None:
    """Frozen statistics, GroupNorm or ours that is trained in the place of every batch norm.

    Args:
        network: changed in place. A convolution takes up the frozen norm that comes next among its
            module's children, and so has to be called right before it.
        norm: as of ``BackboneConfig``.
    """
    for module in network.modules():
        before: tuple[nn.Module, str, nn.Module] | None = None
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.BatchNorm2d) and norm == "frozen":
                _freeze(module, name, child, before)
            elif isinstance(child, nn.BatchNorm2d):
                groups = norm == "group"
                trained = group_norm(child.num_features) if groups else BatchNorm2d.like(child)
                setattr(module, name, trained)
            before = module, name, child
            if isinstance(module, ResNetVd) and name == "conv1":  # its stem; a norm comes next
                before = child, *[*child.named_children()][-1]
        if norm == "frozen":
            with_frozen_norms(module)


def _freeze(
    parent: nn.Module,
    name: str,
    norm: nn.BatchNorm2d,
    before: tuple[nn.Module, str, nn.Module] | None,
) -> None:
    """Freeze a norm; a convolution right before it, given by parent and name, takes it up."""
    if before is None or not isinstance(before[2], nn.Conv2d):
        setattr(parent, name, FusedFrozenBatchNorm2d(norm.num_features, eps=norm.eps))
        return
    taken = FrozenNorm(norm.num_features, norm.eps)
    setattr(parent, name, taken)
    setattr(before[0], before[1], NormedConv2d(before[2], taken))


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, or as many as there can be of at least two channels each."""
    most = min(32, channels // 2)
    return GroupNorm(next(n for n in range(most, 0, -1) if channels % n == 0), channels)


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
