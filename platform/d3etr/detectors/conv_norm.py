"""A convolution with batch norm, and the activation that most of them have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from d3etr.detectors.batch_norm import BatchNorm2d
from d3etr.detectors.transformer import Activation

silu = partial(nn.SiLU, inplace=True)


class ConvNorm(nn.Module):
    """A convolution without bias, batch norm over all workers unless told, and an activation.

    Args:
        inputs: channels.
        outputs: channels.
        size: of the kernel; padded so that stride alone changes the resolution.
        stride: 1 or 2.
        groups: of channels that the convolution keeps apart.
        activation: after the norm.
        norm: makes the norm of so many channels.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        activation: Activation = nn.Identity,
        norm: Callable[[int], nn.Module] = BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False
        )
        self.norm = norm(outputs)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, outputs, ceil(h / stride), ceil(w / stride)]."""
        return self.activation(self.norm(self.conv(x)))  # type: ignore[no-any-return]
