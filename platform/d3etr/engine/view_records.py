"""Runs the teacher on views of training images: what it says about each, ready to be stored.

Shapes: B images · V levels · S tokens of the teacher's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d3etr.config.training import Precision
from d3etr.data.loading import ViewBatches
from d3etr.data.sampling import BatchKey
from d3etr.data.view_grids import own_tokens
from d3etr.data.views import GRIDS, MOVED, RAGGED, Arrays
from d3etr.detectors.base import DetectionTransformer
from d3etr.engine.optimiser import autocast
from d3etr.errors import UserError
from d3etr.methods.stored import StoredParts, outputs_to_store
from d3etr.structures import ImageBatch


@dataclass(frozen=True)
class ViewTeacher:
    """The teacher as it looks at views.

    Attributes:
        teacher: frozen, on ``device``.
        batches: gives images in their views.
        parts: what is kept of its outputs.
        dtype: of what is kept.
        precision: of its forward passes.
        batch_size: images of a pass.
        device: where it is.
    """

    teacher: DetectionTransformer
    batches: ViewBatches
    parts: StoredParts
    dtype: torch.dtype
    precision: Precision
    batch_size: int
    device: torch.device

    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each level; none where nothing that is kept is on the levels."""
        config = self.teacher.config
        if not (self.parts.attention or config.queries_need_images):
            return ()
        return self.teacher.level_strides

    def records(self, images: Sequence[int], view: int) -> list[Arrays]:
        """What the teacher says about each image in a view.

        Raises:
            UserError: an image cannot be read, or a number does not fit into ``dtype``.
        """
        found: dict[int, Arrays] = {}
        plans = {index: self.batches.plan(index, view) for index in images}
        ordered = sorted(images, key=lambda index: plans[index].size)  # so that few are padded
        keys = []
        for start in range(0, len(ordered), self.batch_size):
            part = ordered[start : start + self.batch_size]
            size = np.max([plans[index].size for index in part], 0).tolist()
            keys.append(BatchKey(tuple(part), view, tuple(size)))
        for key, (batch, _) in zip(keys, self.batches.batches(keys), strict=True):
            seen = [plans[index].teacher_size or plans[index].size for index in key.indices]
            shown = (batch.for_teacher or batch).to(self.device)
            found |= zip(key.indices, self._look(shown, seen), strict=True)
        return [found[index] for index in images]

    def blank_record(self, size: tuple[int, int]) -> Arrays:
        """What would be stored of an image of ``size`` (height, width) pixels, without content."""
        pixels = torch.zeros(1, 3, *size, device=self.device)
        [record] = self._look(ImageBatch(pixels), [size])
        return record

    @torch.no_grad()
    def _look(self, batch: ImageBatch, sizes: Sequence[tuple[int, int]]) -> Iterator[Arrays]:
        """The record of each image of a batch; ``sizes`` are theirs in pixels."""
        with autocast(self.precision, self.device):
            values, levels = outputs_to_store(self.teacher, batch, self.parts)
        kept = {name: self._rounded(value).cpu().numpy() for name, value in values.items()}
        strides = self.strides()
        for row, (height, width) in enumerate(sizes):
            own = tuple((-(-height // step), -(-width // step)) for step in strides)
            record = {}
            for name, value in kept.items():
                move = own_tokens if name in RAGGED else MOVED.get(name)
                record[name] = value[row] if move is None else move(value[row], levels, own)
            yield record | ({GRIDS: np.array(own, dtype=np.int32)} if own else {})

    def _rounded(self, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        rounded = value.to(self.dtype)
        if not torch.equal(rounded.isfinite(), value.isfinite()):
            raise UserError(
                "the teacher's outputs have numbers that float16 cannot hold: set "
                "teacher.views.precision to float32"
            )
        return rounded
