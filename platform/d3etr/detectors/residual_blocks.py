"""ResNet's blocks with frozen norms: on a GPU, whatever follows a convolution is one kernel.

Shapes: B images · C channels · h, w cells of a map; C', h', w' after a convolution.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from d3etr.detectors.frozen_norms import NormedConv2d
from d3etr.kernels.availability import runs_kernels


class RectifiedConvolution(nn.Sequential):
    """A convolution, the frozen norm that it has taken up and a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C', h', w']."""
        return _rectified(cast(NormedConv2d, self[0]), x)


class FrozenBasicBlock(BasicBlock):  # type: ignore[misc]
    """Two convolutions and what passes them by."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C', h', w']."""
        shortcut = self.downsample and self.downsample[0]
        return _joined(self.conv2, _rectified(self.conv1, x), shortcut, x)


class FrozenBottleneck(Bottleneck):  # type: ignore[misc]
    """Three convolutions and what passes them by."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C', h', w']."""
        narrow = _rectified(self.conv2, _rectified(self.conv1, x))
        return _joined(self.conv3, narrow, self.downsample and self.downsample[0], x)


_WITH_FROZEN_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: FrozenBasicBlock,
    Bottleneck: FrozenBottleneck,
}


def with_frozen_norms(block: nn.Module) -> None:
    """Let one of torchvision's residual blocks, whose norms are frozen, compute as those here do.

    Modules of other kinds stay as they are.
    """
    block.__class__ = _WITH_FROZEN_NORMS.get(type(block), type(block))


def _rectified(convolution: NormedConv2d, x: Tensor) -> Tensor:
    """relu(convolution(x))."""
    if not _fuses(x):
        maps: Tensor = convolution(x)
        return maps.relu_()
    from d3etr.kernels.epilogue import shift_and_rectify

    return shift_and_rectify(*convolution.unshifted(x))


def _joined(
    convolution: NormedConv2d, x: Tensor, shortcut: NormedConv2d | None, identity: Tensor
) -> Tensor:
    """relu(convolution(x) + shortcut(identity)); no shortcut leaves the identity as it is."""
    if not _fuses(x):
        maps: Tensor = convolution(x)
        maps += identity if shortcut is None else shortcut(identity)
        return maps.relu_()
    from d3etr.kernels.epilogue import shift_and_rectify

    maps, shift = convolution.unshifted(x)
    if shortcut is not None:
        identity, its_shift = shortcut.unshifted(identity)
        shift = shift + its_shift  # of both at once: the shortcut's maps need no pass of their own
    return shift_and_rectify(maps, shift, identity)


def _fuses(x: Tensor) -> bool:
    """Whether kernels run where x is; what torch.compile traces is fused by its own."""
    return not torch.compiler.is_compiling() and runs_kernels(x.device)
