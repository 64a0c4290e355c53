"""What follows a convolution in a residual block, in one pass over its maps.

cuDNN adds a convolution's bias in a pass of its own, slower than its memory asks for; the residual
sum and the ReLU are two more. A kernel does all three where the convolution has written, and
another one takes the gradient back through them.

Shapes: B images · C channels · h, w cells of a map. Kernels see [B, C, h, w], channels last, as
B h w C values in a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Values of each program."""
WARPS = 4
"""Of each program."""
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
"""Kernels compute in float32, which is no less than any of these."""


def shift_and_rectify(maps: Tensor, shift: Tensor, identity: Tensor | None = None) -> Tensor:
    """relu(maps + shift + identity), with gradients for maps and identity.

    Args:
        maps: [B, C, h, w], a convolution's output that nobody else reads: it is overwritten.
        shift: [C], not trained.
        identity: [B, C, h, w], left as it is, or None.

    Returns:
        ``maps``, rounded once if the kernel ran; it does on maps that lie channels last.
    """
    if _runs_on(maps) and (identity is None or _runs_on(identity)):
        rectified: Tensor = _ShiftAndRectify.apply(maps, shift, identity)
        return rectified
    maps += shift[:, None, None]
    if identity is not None:
        maps += identity
    return maps.relu_()


def _runs_on(maps: Tensor) -> bool:
    in_rows = maps.is_contiguous(memory_format=torch.channels_last)
    return in_rows and maps.dtype in PRECISIONS and maps.numel() > 0


class _ShiftAndRectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, shift: Tensor, identity: Tensor | None) -> Tensor:
        with torch.cuda.device_of(maps):  # type: ignore[no-untyped-call]
            _forward[(triton.cdiv(maps.numel(), BLOCK),)](
                *(maps, shift, identity, maps.numel()),
                CHANNELS=maps.shape[1],
                BESIDE=identity is not None,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
        ctx.mark_dirty(maps)
        # The next convolution keeps the same tensor: this costs no memory.
        ctx.save_for_backward(maps)
        ctx.has_identity = identity is not None
        return maps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (maps,) = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        passed = torch.empty_like(gradient)
        with torch.cuda.device_of(maps):  # type: ignore[no-untyped-call]
            _backward[(triton.cdiv(maps.numel(), BLOCK),)](
                *(maps, gradient, passed, maps.numel()), BLOCK=BLOCK, num_warps=WARPS
            )
        # One tensor for both, as autograd's own sum does: it never writes into what is shared.
        return passed, None, passed if ctx.has_identity else None


@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    maps: tl.tensor,
    shift: tl.tensor,
    identity: tl.tensor,
    total: tl.tensor,
    CHANNELS: tl.constexpr,  # noqa: N803
    BESIDE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Shift, add and rectify a row of values in place."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    places = tl.arange(0, BLOCK)
    inside = places < total - start
    # The remainder of 32-bit numbers by a constant is cheap.
    channels = ((start % CHANNELS).to(tl.int32) + places) % CHANNELS
    if CHANNELS % 16 == 0:
        # As the compiler doesn't see, 16 values from a multiple of 16 on are those of 16 channels.
        channels = tl.max_contiguous(tl.multiple_of(channels, 16), 16)
    value = tl.load(maps + start + places, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(shift + channels).to(tl.float32)
    if BESIDE:
        value += tl.load(identity + start + places, mask=inside, other=0.0).to(tl.float32)
    # Unlike a maximum, this lets NaN through: a run that diverges must show it.
    value = tl.where(value < 0.0, 0.0, value)
    tl.store(maps + start + places, value.to(maps.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(
    maps: tl.tensor,
    gradient: tl.tensor,
    passed: tl.tensor,
    total: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """The gradient where a row of rectified values is not zero."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    places = tl.arange(0, BLOCK)
    inside = places < total - start
    value = tl.load(maps + start + places, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(gradient + start + places, mask=inside, other=0.0)
    tl.store(passed + start + places, tl.where(value <= 0.0, 0.0, given), mask=inside)
