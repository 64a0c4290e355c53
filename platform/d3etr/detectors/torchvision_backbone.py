"""Torchvision's networks as backbones: what comes before the pooling, by stages.

Shapes: B images · h, w cells of a stage's map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import VGG, ConvNeXt, DenseNet, ResNet, SwinTransformer

from d3etr.config.detector import BackboneConfig
from d3etr.detectors.frozen_norms import (
    FrozenNorm,
    FusedFrozenBatchNorm2d,
    NormedConv2d,
    RectifiedConvolution,
    with_frozen_norms,
)
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


class _Stage(NamedTuple):
    """What runs one after the other to a map of ``channels`` with ``stride`` pixels per cell."""

    steps: list[nn.Module]
    channels: int
    stride: int


class TorchvisionBackbone(nn.Module):
    """A torchvision network without its classifier; weight names are torchvision's.

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
        _replace_batch_norm(network, config.norm)
        for name, child in network.named_children():
            if name in HEAD:
                break
            self.add_module(name, child)
        self._rounds_down = isinstance(network, ROUNDING_DOWN)
        self._channels_at_the_end = isinstance(network, CHANNELS_AT_THE_END)
        steps = _steps(self)
        if isinstance(network, DenseNet):
            steps.append(nn.ReLU())  # the last one is no module there
        # Lists, not module lists: state dicts have torchvision's names alone.
        self._stem, self._stages = _split(steps, self._measure(steps))
        if isinstance(network, ResNet) and config.norm == "frozen":
            self._stem = [RectifiedConvolution(*self._stem)]
        if config.dilation:
            _dilate(self.get_submodule("layer4"))
            self._stages[-1] = self._stages[-1]._replace(stride=self._stages[-2].stride)
        self.stage_channels = tuple(stage.channels for stage in self._stages)
        self.stage_strides = tuple(stage.stride for stage in self._stages)
        self.channels, self.stride = self.stage_channels[-1], self.stage_strides[-1]
        parts = [self._stem, *(stage.steps for stage in self._stages)]
        for step in (step for part in parts[: config.frozen_stages] for step in part):
            step.requires_grad_(False)

    @torch.no_grad()
    def _measure(self, steps: Sequence[nn.Module]) -> list[tuple[int, int]]:
        """Channels, and pixels per cell, after every step."""
        self.eval()  # a forward pass that draws nothing
        x = torch.zeros(1, 3, _PROBE, _PROBE, device=next(self.parameters()).device)
        shapes = []
        for step in steps:
            x = step(x)
            features = self._channels_first(x)
            shapes.append((features.shape[1], _PROBE // features.shape[2]))
        self.train()
        return shapes

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
        for step in self._stem:
            x = step(x)
        maps = []
        for stage in self._stages:
            for step in stage.steps:
                x = step(x)
            rows, columns = -(-height // stage.stride), -(-width // stage.stride)
            maps.append(self._channels_first(x)[..., :rows, :columns])
        return maps[-count:]


def _steps(backbone: nn.Module) -> list[nn.Module]:
    """What runs one after the other; sequences one level deep are taken apart."""
    steps: list[nn.Module] = []
    for child in backbone.children():
        steps += child if isinstance(child, nn.Sequential) else [child]
    return steps


def _split(
    steps: Sequence[nn.Module], shapes: Sequence[tuple[int, int]]
) -> tuple[list[nn.Module], list[_Stage]]:
    """The stem, and a stage for each stride from 4 on; the stem has at least one step."""
    begin = max(1, next(k for k, (_, stride) in enumerate(shapes) if stride >= FIRST_STRIDE))
    channels = {stride: count for count, stride in shapes if stride >= FIRST_STRIDE}
    stages = [_Stage([], count, stride) for stride, count in channels.items()]
    for step, (_, stride) in zip(steps[begin:], shapes[begin:], strict=True):
        stages[list(channels).index(stride)].steps.append(step)
    return list(steps[:begin]), stages


def build_network(name: str) -> nn.Module:
    """Torchvision's whole network with random weights, on the default device.

    Raises:
        UserError: the installed torchvision is older than the network.
    """
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


def _replace_batch_norm(network: nn.Module, norm: str) -> None:
    """Frozen statistics or GroupNorm in the place of every batch norm."""
    for module in network.modules():
        before: tuple[str, nn.Module] | None = None
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.BatchNorm2d):
                if norm == "frozen":
                    _freeze(module, name, child, before)
                else:
                    setattr(module, name, _group_norm(child.num_features))
            before = name, child
        if norm == "frozen":
            with_frozen_norms(module)


def _freeze(
    parent: nn.Module, name: str, norm: nn.BatchNorm2d, before: tuple[str, nn.Module] | None
) -> None:
    """Freeze a norm; a convolution right before it takes it up."""
    if before is None or not isinstance(before[1], nn.Conv2d):
        setattr(parent, name, FusedFrozenBatchNorm2d(norm.num_features, eps=norm.eps))
        return
    taken = FrozenNorm(norm.num_features, norm.eps)
    setattr(parent, name, taken)
    setattr(parent, before[0], NormedConv2d(before[1], taken))


def _group_norm(channels: int) -> nn.GroupNorm:
    """Of 32 groups, or as many as there can be of at least two channels each."""
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
