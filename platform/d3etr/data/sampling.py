"""Which images each optimiser step sees, and which worker gets which of them.

A global batch depends on the seed and the epoch alone. Workers and accumulation only cut it
into micro-batches, all padded to the size of the global batch, so the losses of a step are the
same however it is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d3etr.data.augmentation import ALWAYS, Shown

# Batches that are sorted by shape together: more gives less padding and less random company.
_WINDOW_BATCHES = 32
# Keeps the order of batches apart from the augmentation of images under the same seed.
_ORDER_STREAM = 0x0B5E55ED
# Keeps the order of images without labels apart from that of those with.
_UNLABELLED_STREAM = 0x0DD1AB31


@dataclass(frozen=True)
class BatchKey:
    """What a loading process needs to know to make one batch.

    Attributes:
        indices: images of the split, those with labels first. Of those without, numbers go on
            from pass to pass: behind n with labels, n + p m + i is image i of m in its pass p.
        epoch: seeds augmentation, where there is any.
        size: (height, width) in pixels to pad to.
        teacher_size: the same of what the teacher sees, where that is another size.
        taught: whether the teacher's part comes with the images.
        shown: what its step says about how images are augmented.
    """

    indices: tuple[int, ...]
    epoch: int
    size: tuple[int, int]
    teacher_size: tuple[int, int] | None = None
    taught: bool = True
    shown: Shown = ALWAYS


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


def unlabelled_passes(epoch: int, drawn: int, images: int) -> range:
    """The passes over images without labels that an epoch sees a part of.

    Args:
        epoch: from 0, of the images with labels.
        drawn: images without labels in an epoch.
        images: without labels.
    """
    return range(epoch * drawn // images, -(-(epoch + 1) * drawn // images))


def add_unlabelled(
    batches: NDArray[np.int64],
    sizes: NDArray[np.int64],
    labelled: int,
    count: int,
    passes: range,
    seed: int,
    epoch: int,
    bucket: bool,
) -> NDArray[np.int64]:
    """[steps, batch + count]: batches of images with labels, and behind them images without.

    Epochs are those of the images with labels. The others come in an endless row of passes, each
    of them once in every pass, in an order that depends on the seed alone: an epoch sees the next
    part of it.

    Args:
        batches: [steps, batch] indices of images with labels.
        sizes: [images, 2] (height, width) after transforms, those with labels first, behind them
            those without in each of ``passes``; the result's indices are of these.
        labelled: images with labels.
        count: images without labels in a batch.
        passes: ``unlabelled_passes`` of this epoch.
        seed: of the run.
        epoch: from 0.
        bucket: bring images of like shape together.
    """
    steps, images = len(batches), (len(sizes) - labelled) // len(passes)
    start = epoch * steps * count
    orders = [
        images * place
        + np.random.default_rng((seed, number, _UNLABELLED_STREAM)).permutation(images)
        for place, number in enumerate(passes)
    ]
    row = np.concatenate(orders)[start - passes.start * images :]
    drawn = labelled + row[: steps * count].reshape(steps, count)
    if bucket:
        for first in range(0, steps, _WINDOW_BATCHES):
            window = slice(first, first + _WINDOW_BATCHES)
            chosen = drawn[window].reshape(-1)
            like = chosen[_by_shape(sizes[chosen])].reshape(-1, count)
            # Through a view: batches of like shape get the images of like shape.
            drawn[window][_by_shape(sizes[batches[window]].max(1))] = like
    return np.concatenate([batches, drawn], 1)


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
    batches: NDArray[np.int64],
    sizes: NDArray[np.int64],
    epoch: int,
    parts: int,
    mine: range,
    labelled: int | None = None,
) -> list[BatchKey]:
    """The keys of one worker: ``len(mine)`` for each global batch.

    Args:
        batches: [steps, batch_size] image indices.
        sizes: [images, 2] (height, width) after transforms, or [images, 4] with the teacher's.
        epoch: from 0.
        parts: micro-batches of a global batch.
        mine: those of the worker.
        labelled: the first so many of a batch have labels: each micro-batch gets its part of them,
            and of the others; None: all have.
    """
    size = batches.shape[1] // parts
    known = batches.shape[1] if labelled is None else labelled
    keys = []
    for batch in batches:
        height, width, *scaled = sizes[batch].max(0).tolist()
        theirs = (scaled[0], scaled[1]) if scaled else None
        for part in mine:
            first, end = known * part // parts, known * (part + 1) // parts
            others = batch[known:][size * part - first : size * (part + 1) - end]
            indices = (*batch[first:end].tolist(), *others.tolist())
            keys.append(BatchKey(indices, epoch, (height, width), theirs))
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
