"""A loss's weight is steered so that a part of the model has a given share of all gradients.

RT-DETRv4's (arXiv 2510.25257, Gradient-guided Adaptive Modulation): with p the share of |gradient|
that lies in the encoder and p* the wanted one, a weight is multiplied once an epoch by
p* (1 - p) / (p (1 - p*)), kept between 0.1 and 10, where p is further from p* than a tolerance; in
the last epochs it is what the recipe says. Our choice: p is that of a whole epoch, not of one
batch, and the product of all factors has bounds.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from d3etr.config.distillation import GradientShareConfig

_FACTORS = (0.1, 10.0)
"""Bounds of one change; theirs."""
_PRODUCT = (1e-3, 1e3)
"""Bounds of all changes together; ours: a share out of reach would move the weight for ever."""


def _magnitude(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Sum of |gradient| over all elements of parameters that have one, float64 scalar."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients, 1)
    return torch.stack(norms).double().sum()


class GradientShare(nn.Module):
    """Watches gradients over an epoch, then changes a weight; its state is that of the module.

    Workers see the same gradients and so have the same state.

    Args:
        config: the wanted share, its tolerance, and until when.
    """

    factor: Tensor
    """Scalar float32: what the loss's weight is multiplied by."""
    seen: Tensor
    """[2] float64: |gradient| since the last change, of the part and of everything."""

    def __init__(self, config: GradientShareConfig) -> None:
        super().__init__()
        self._config = config
        self.register_buffer("factor", torch.ones(()))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))

    def watch(self, part: nn.Module, whole: nn.Module) -> None:
        """Add the gradients of a step; the host does not wait.

        Args:
            part: whose share is steered.
            whole: what it is a part of.
        """
        self.seen += torch.stack([_magnitude(each.parameters()) for each in (part, whole)])

    def change(self, progress: float) -> str | None:
        """Change the factor by what was seen since the last call.

        Args:
            progress: share of the training that is done, in [0, 1].

        Returns:
            What was done, for people; None where nothing was.
        """
        inside, everything = self.seen.tolist()
        self.seen.zero_()
        if progress >= self._config.until:
            released = bool(self.factor != 1)
            self.factor.fill_(1.0)
            return "the weight is the recipe's again" if released else None
        if not everything:
            return None
        share, wanted = inside / everything, self._config.target
        if abs(share - wanted) <= self._config.tolerance:
            return None
        low, high = _FACTORS
        odds = wanted * (1 - share) / (share * (1 - wanted)) if share else high
        self.factor.mul_(min(high, max(low, odds))).clamp_(*_PRODUCT)
        return f"{100 * share:.1f} % of the gradient: the weight is now x {float(self.factor):.3g}"
