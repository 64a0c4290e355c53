"""The weight of distillation is steered so that it has a given share of all gradients.

RT-DETRv4's (arXiv 2510.25257, Gradient-guided Adaptive Modulation): with p the share of |gradient|
that lies in the encoder and p* the wanted one, a weight is multiplied once an epoch by
p* (1 - p) / (p (1 - p*)), kept between 0.1 and 10, where p is further from p* than a tolerance; in
the last epochs it is what the recipe says.

Our choices: p is that of a whole epoch, not of one batch; a run of few epochs, which may have one
alone, changes the weight ``CHANGES`` times instead; the product of all factors has bounds; and p of
methods whose terms reach the decoder. There the encoder's share does not grow with the weight, so p
is the share of distillation, sum |g_distil| / (sum |g_distil| + sum |g_detection|) over the
student's parameters. For that p one change is exact: p / (1 - p) is proportional to the weight. It
needs the gradient of detection apart, a second pass of the student: one in
``EVERY`` steps that distil has it.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn

from d3etr.config.distillation import GradientShareConfig, MethodConfig

EVERY = 16
"""Of the steps that distil, one in so many is measured where detection is measured apart."""
CHANGES = 10
"""The weight is changed so often in a run of fewer epochs than that."""
_FACTORS = (0.1, 10.0)
"""Bounds of one change; theirs."""
_PRODUCT = (1e-3, 1e3)
"""Bounds of all changes together; ours: a share out of reach would move the weight for ever."""


def gradients(module: nn.Module) -> list[Tensor]:
    """Those of the parameters that have one, in the module's order."""
    return [p.grad for p in module.parameters() if p.grad is not None]


def _magnitude(parts: list[Tensor]) -> Tensor:
    """Sum of absolute values over all elements, float64 scalar."""
    return torch.stack(torch._foreach_norm(parts, 1)).double().sum()


class GradientShare(nn.Module):
    """Watches gradients for some steps, then changes a factor; its state is that of the module.

    Workers see the same gradients and so have the same state.

    Args:
        config: the wanted share, its tolerance, and until when.
        every_steps: as of the method's configuration: steps from one that distils to the next.
    """

    factor: Tensor
    """Scalar float32: what distillation's weights are multiplied by."""
    seen: Tensor
    """[2] float64: |gradient| since the last change, of the part and of everything."""

    def __init__(self, config: GradientShareConfig, every_steps: int = 1) -> None:
        super().__init__()
        self._config, self._every = config, EVERY * every_steps
        self.register_buffer("factor", torch.ones(()))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))

    @classmethod
    def of(cls, method: MethodConfig) -> GradientShare | None:
        """That of a method; None where its configuration steers nothing."""
        config: GradientShareConfig | None = getattr(method, "gradient_share", None)
        return None if config is None else cls(config, getattr(method, "every_steps", 1))

    def needs_detection(self, step: int, steps: int) -> bool:
        """Whether ``watch`` takes the gradients of detection at ``step`` of ``steps``."""
        measured = not self._config.of_encoder and step % self._every == 0
        return measured and step < self._steered(steps)

    def _steered(self, steps: int) -> int:
        """The first so many of ``steps`` are steered."""
        return ceil(self._config.until * steps)

    def watch(self, student: nn.Module, detection: list[Tensor] | None = None) -> None:
        """Add the gradients of a step that distilled, before they are clipped.

        The host does not wait.

        Args:
            student: its parameters have the gradients of all losses, of all workers.
            detection: those of detection losses alone, as ``gradients`` gives them; None in steps
                that are not measured.
        """
        whole = gradients(student)
        if self._config.of_encoder:
            part = _magnitude(gradients(student.get_submodule("encoder")))
            self.seen += torch.stack([part, _magnitude(whole)])
        elif detection is not None:
            part = _magnitude([*torch._foreach_sub(whole, detection)])
            self.seen += torch.stack([part, part + _magnitude(detection)])

    def steer(self, step: int, steps: int, per_epoch: int) -> str | None:
        """Change the factor where it is time, behind each optimiser step.

        Args:
            step: the one that comes next, of ``steps``.
            steps: of the whole run.
            per_epoch: steps of an epoch.

        Returns:
            What was done, for people; None where nothing was.
        """
        steered = self._steered(steps)
        if step == steered < steps:
            released = bool(self.factor != 1)
            self.factor.fill_(1.0)
            return "the weight is the recipe's again" if released else None
        every = min(per_epoch, ceil(steps / CHANGES))
        return self.change() if step < steered and step % every == 0 else None

    def change(self) -> str | None:
        """Change the factor by what was seen since the last call; the result is as of ``steer``."""
        inside, everything = self.seen.tolist()
        self.seen.zero_()
        if not everything:
            return None
        share, wanted = inside / everything, self._config.target
        if abs(share - wanted) <= self._config.tolerance:
            return None
        low, high = _FACTORS
        odds = wanted * (1 - share) / (share * (1 - wanted)) if share else high
        self.factor.mul_(min(high, max(low, odds))).clamp_(*_PRODUCT)
        name = "the encoder" if self._config.of_encoder else "distillation"
        found = f"{name} has {100 * share:.1f} % of the gradient"
        return f"{found}: the weight is now x {float(self.factor):.3g}"
