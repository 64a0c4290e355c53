"""Batch norm that is trained, its statistics taken over all workers.

Shapes: B images · C channels · h, w cells of a map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_OVER = (0, 2, 3)
"""Images and cells: what a channel's statistics are taken over."""


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm over one micro-batch of all workers together.

    With one worker it is PyTorch's. With several (``torch.distributed``, gloo or nccl), mean,
    variance and their gradients are those of the workers' images joined, which may be of other
    numbers and sizes on each: all workers have to come here equally often. What is frozen
    (``weight`` takes no gradient) keeps its statistics in training too.

    Names in the state dict are those of frozen batch norm: ``weight``, ``bias``, ``running_mean``
    and ``running_var``. PyTorch's counter of batches, of which nothing depends, is not among them
    and is passed over where a state has it.

    Args:
        channels: C.
        eps: added to the variance.
        momentum: of a batch in the running statistics.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels, eps, momentum)
        self.register_buffer("num_batches_tracked", None)

    @classmethod
    def like(cls, norm: nn.BatchNorm2d) -> BatchNorm2d:
        """A new one in the place of PyTorch's."""
        momentum = 0.1 if norm.momentum is None else norm.momentum
        return BatchNorm2d(norm.num_features, norm.eps, momentum)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w], normalised, scaled and shifted.

        Raises:
            ValueError: in training, a channel has a single value.
        """
        learns = self.training and self.weight.requires_grad
        if learns and _workers() > 1:
            joined: Tensor = self._over_workers(x)
            return joined
        if torch.is_grad_enabled() and x.device.type == "cpu" and len(x) == 1:
            # PyTorch (2.14) misreads a gradient in another layout than its input's: one image has
            # strides of both.
            x = x.contiguous(memory_format=torch.channels_last)
        running = self.running_mean, self.running_var
        return functional.batch_norm(
            x, *running, self.weight, self.bias, learns, self.momentum, self.eps
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _over_workers(self, x: Tensor) -> Tensor:
        mean, variance, count = _joined_statistics(x)
        with torch.no_grad():
            unbiased = variance * (count / (count - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        statistics = mean, variance, count, self.eps
        result: Tensor = _Normalise.apply(x, self.weight, self.bias, *statistics)
        return result

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any, **named: Any
    ) -> None:
        """As any module's: PyTorch's for norms would put the counter in."""
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *others, **named)


def trained_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Running statistics that training changes, by name; those of what is frozen are left out."""
    return {
        f"{place}.{name}" if place else name: buffer
        for place, norm in module.named_modules()
        if isinstance(norm, BatchNorm2d) and norm.weight.requires_grad
        for name, buffer in norm.named_buffers(recurse=False)
    }


@contextmanager
def unchanged(statistics: Sequence[Tensor]) -> Iterator[None]:
    """Passes within leave running statistics as they were: a batch counts once, not in each."""
    before = [buffer.clone() for buffer in statistics]
    yield
    if before:
        torch._foreach_copy_([*statistics], before)


def _workers() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def _joined_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C] and (biased) variance [C] over all workers, and [] how many values each is of.

    Every worker's own come from the same collective, and are put together as Chan et al. do
    (1979): sums of squares would lose what is small beside the mean.
    """
    variance, mean = torch.var_mean(_precise(x), _OVER, correction=0)
    table = mean.new_zeros(_workers(), 2 * len(mean) + 1)
    table[dist.get_rank()] = torch.cat([mean, variance, mean.new_tensor([x[:, 0].numel()])])
    dist.all_reduce(table)
    means, variances, counts = torch.split(table, [len(mean), len(mean), 1], 1)
    count = counts.sum()
    shares = counts / count
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0), count


def _precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, the statistics being of all workers' x.

    Gradients of weight and bias are this worker's: whoever adds up those of all parameters adds
    up these.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        """[B, C, h, w] of x's dtype."""
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        return functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x [B, C, h, w], weight [C] and bias [C]."""
        x, weight, mean, inverse, count = cast("tuple[Tensor, ...]", ctx.saved_tensors)
        above, centred = _precise(gradient), _precise(x) - _wide(mean)
        own = torch.stack([above.sum(_OVER), (above * centred).sum(_OVER) * inverse])
        sums = own.clone()
        dist.all_reduce(sums)
        to_mean, to_scale = sums / count
        scale = weight * inverse
        below = above - _wide(to_mean) - centred * _wide(to_scale * inverse)
        below = (below * _wide(scale)).to(x.dtype)
        return below, own[1].to(weight.dtype), own[0].to(weight.dtype), None, None, None, None


def _wide(values: Tensor) -> Tensor:
    """[C] beside [B, C, h, w]."""
    return values[:, None, None]
