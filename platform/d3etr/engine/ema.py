"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from d3etr.detectors.batch_norm import trained_statistics


class WeightAverage:
    """average <- d average + (1 - d) weights after every optimiser step.

    The decay d grows as min(decay, (1 + step) / (10 + step)), so that a short run does not
    average its random beginning in. Running statistics of batch norm that is trained are averaged
    as the weights are that they belong to. What is frozen, and other buffers, are taken as they
    are.

    Args:
        module: whose trained weights are averaged: those that require a gradient by now.
        decay: the final d, in (0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        parameters = dict(module.named_parameters())
        self._weights = {name: p.detach() for name, p in parameters.items() if p.requires_grad}
        self._weights |= trained_statistics(module)
        self._names = frozenset({*parameters, *self._weights})
        self._average = {name: p.clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after optimiser ``step`` (from 0) in."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._average.values()), list(self._weights.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the average inside the ``with`` block, its own weights after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            kept = weight.clone()
            weight.copy_(self._average[name])
            self._average[name].copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> averaged weight, of those that are trained."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over saved averages; those of weights that are frozen here do not count.

        Raises:
            ValueError: the names are not this module's.
        """
        odd = sorted({*(state.keys() - self._names), *(self._average.keys() - state.keys())})
        if odd:
            raise ValueError(f"averaged weights do not fit the module: {odd[:5]}")
        for name, average in self._average.items():
            average.copy_(state[name])
