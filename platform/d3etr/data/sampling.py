"""Which images each optimiser step sees, and which worker gets which of them.

A global batch depends on the seed and the epoch alone. Workers and accumulation only cut it
into micro-batches, all padded to the size of the global batch, so the losses of a step are the
same however it is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Batches that are sorted by shape together: more gives less padding and less random company.
_WINDOW_BATCHES = 32
# Keeps the order of batches apart from the augmentation of images under the same seed.
_ORDER_STREAM = 0x0B5E55ED


@dataclass(frozen=True)
class BatchKey:
    """What a loading process needs to know to make one batch.

    Attributes:
        indices: images of the split.
        epoch: seeds augmentation, where there is any.
        size: (height, width) in pixels to pad to.
        teacher_size: the same of what the teacher sees, where that is another size.
    """

    indices: tuple[int, ...]
    epoch: int
    size: tuple[int, int]
    teacher_size: tuple[int, int] | None = None


def epoch_batches(
    sizes: NDArray[np.int64], batch_size: int, seed: int, epoch: int, bucket: bool
) -> NDArray[np.int64]:
    """[steps, batch_size] image indices of every global batch of an epoch, in order.

    Images that do not fill a last batch are left out, others in each epoch.

    Args:
        sizes: [images, 2] (height, width) after transforms.
        batch_size: images per optimiser step.
        seed: of the run.
        epoch: from 0.
        bucket: batch images of like shape.
    """
    generator = np.random.default_rng((seed, epoch, _ORDER_STREAM))
    order = generator.permutation(len(sizes))
    order = order[: len(order) // batch_size * batch_size]
    if not bucket or len(np.unique(sizes, axis=0)) == 1:
        return order.reshape(-1, batch_size)
    window = _WINDOW_BATCHES * batch_size
    windows = [order[start : start + window] for start in range(0, len(order), window)]
    batches = np.concatenate([part[_by_shape(sizes[part])] for part in windows])
    return generator.permutation(batches.reshape(-1, batch_size))


def _by_shape(sizes: NDArray[np.int64]) -> NDArray[np.intp]:
    """[n] order of images in which neighbours need little padding."""
    aspect = sizes[:, 1] / sizes[:, 0]
    # Lying, square and standing images first, then size: within a group of one orientation the
    # side that differs most between images is the longer one.
    orientation = np.sign(np.round(np.log2(aspect), 2))
    return np.lexsort((sizes.min(1), sizes.max(1), orientation))


def share(micro_batches: int, rank: int, world_size: int) -> range:
    """Which of a step's micro-batches are one worker's; workers differ by one at most.

    Args:
        micro_batches: per optimiser step over all workers, at least ``world_size``.
        rank: the worker.
        world_size: number of workers.
    """
    return range(
        micro_batches * rank // world_size,
        micro_batches * (rank + 1) // world_size,
    )


def micro_batches(
    batches: NDArray[np.int64], sizes: NDArray[np.int64], epoch: int, parts: int, mine: range
) -> list[BatchKey]:
    """The keys of one worker: ``len(mine)`` for each global batch.

    Args:
        batches: [steps, batch_size] image indices.
        sizes: [images, 2] (height, width) after transforms, or [images, 4] with the teacher's.
        epoch: from 0.
        parts: micro-batches of a global batch.
        mine: those of the worker.
    """
    keys = []
    for batch in batches:
        height, width, *others = sizes[batch].max(0).tolist()
        theirs = (others[0], others[1]) if others else None
        own = batch.reshape(parts, -1)[mine.start : mine.stop]
        keys += [BatchKey(tuple(part.tolist()), epoch, (height, width), theirs) for part in own]
    return keys


def evaluation_keys(
    sizes: NDArray[np.int64], batch_size: int, rank: int, world_size: int, bucket: bool
) -> list[BatchKey]:
    """One worker's share of batches that together hold every image exactly once."""
    order = _by_shape(sizes) if bucket else np.arange(len(sizes))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [
        BatchKey(tuple(batch.tolist()), 0, tuple(sizes[batch].max(0).tolist()))
        for batch in batches[rank::world_size]
    ]
