"""Losses of the steps since the last log: kept on the device, read all at once.

Reading a loss makes the host wait for the device, so that is done once per log and not once
per step; the rows still tell at which step a loss stopped being finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d3etr.errors import UserError


class TrainingDiverged(UserError):  # noqa: N818 - it says what happened
    """A loss became NaN or infinite.

    Args:
        step: optimiser step, from 0.
        what: names of the losses.
        image_ids: the images of that step, as far as this worker knows them.
    """

    def __init__(self, step: int, what: Sequence[str], image_ids: Sequence[int]) -> None:
        self.step, self.what, self.image_ids = step, tuple(what), tuple(image_ids)
        images = ", ".join(map(str, image_ids)) or "of another worker"
        super().__init__(
            f"training diverged: {', '.join(what)} became NaN or infinite at optimiser step "
            f"{step}, image ids {images}. The last good checkpoint is kept. Lower "
            "optimisation.learning_rate or optimisation.clip_norm, use float32, or look at "
            "these images' annotations (d3etr check-data)."
        )


@dataclass
class LossWindow:
    """Named losses of consecutive optimiser steps.

    Attributes:
        names: the losses; fixed by the first step.
        first_step: optimiser step of the first row.
    """

    names: tuple[str, ...] = ()
    first_step: int = 0
    _rows: list[Tensor] = field(default_factory=list)
    _image_ids: list[tuple[int, ...]] = field(default_factory=list)
    _norms: list[Tensor] = field(default_factory=list)

    def add(self, step: int, losses: Mapping[str, Tensor], image_ids: tuple[int, ...]) -> Tensor:
        """Take in the losses of one micro-batch; those of the same step are added up.

        Args:
            step: optimiser step; consecutive, micro-batches of one step in a row.
            losses: name -> scalar; may be overwritten afterwards.
            image_ids: the micro-batch's images.

        Returns:
            Scalar: the sum of the losses, ready for backward.
        """
        if not self._rows:
            self.first_step = step
        if not self.names:
            self.names = tuple(losses)
        if tuple(losses) != self.names:
            raise ValueError(f"losses changed from {self.names} to {tuple(losses)}")
        values = torch.stack([losses[name] for name in self.names])
        row = values.detach()
        if step - self.first_step < len(self._rows):
            self._rows[-1] = self._rows[-1] + row
            self._image_ids[-1] += image_ids
        else:
            self._rows.append(row)
            self._image_ids.append(image_ids)
        return values.sum()

    def add_norm(self, norm: Tensor) -> None:
        """Take in the gradient norm of the step, the same on all workers."""
        self._norms.append(norm)

    def __len__(self) -> int:
        return len(self._rows)

    def norms(self) -> Tensor:
        """[steps] gradient norms, on the device."""
        return torch.stack(self._norms)

    def rows(self) -> Tensor:
        """[steps, losses] on the device."""
        return torch.stack(self._rows)

    def clear(self) -> None:
        """Start anew after a log."""
        self._rows.clear()
        self._image_ids.clear()
        self._norms.clear()

    def check(self, values: Tensor, norms: Tensor) -> None:
        """Stop at the first step that is not finite.

        Args:
            values: [steps, losses] on the host: this window's rows, or their sum over workers.
            norms: [steps] gradient norms on the host.

        Raises:
            TrainingDiverged: with this worker's images, if they were part of the trouble.
        """
        table = torch.cat([values, norms[:, None]], 1).isfinite()
        if bool(table.all()):
            return
        index = int((~table).any(1).nonzero()[0])
        names = (*self.names, "the gradient's norm")
        odd = [n for n, finite in zip(names, table[index].tolist(), strict=True) if not finite]
        elsewhere = bool(self._rows[index].isfinite().all()) and not bool(table[index, :-1].all())
        raise TrainingDiverged(
            self.first_step + index, odd, () if elsewhere else self._image_ids[index]
        )

    def explain(self, step: int, image_ids: tuple[int, ...], reason: str) -> TrainingDiverged:
        """The error to raise when outputs at ``step`` were not finite.

        That usually shows a step late: if a loss of this window was the first, that is named.
        """
        done = [(row, self.first_step + k) for k, row in enumerate(self._rows)]
        for (row, at), images in zip(done, self._image_ids, strict=True):
            odd = ~row.isfinite()
            if bool(odd.any()):
                names = [n for n, bad in zip(self.names, odd.tolist(), strict=True) if bad]
                return TrainingDiverged(at, names, images)
        return TrainingDiverged(step, [f"a matching cost ({reason})"], image_ids)
