"""Batches for training and evaluation, made in worker processes or in place."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, get_worker_info

from d3etr.config.data import DataConfig
from d3etr.data.augmentation import Augmentation, Shown
from d3etr.data.dataset import CACHE_BYTES, FIRST_PASS, DetectionDataset, MixedDataset
from d3etr.data.preprocessing import output_size
from d3etr.data.processes import prepare_process, safe_context
from d3etr.data.sampling import (
    BatchKey,
    add_unlabelled,
    epoch_batches,
    evaluation_keys,
    micro_batches,
    share,
    unlabelled_passes,
)
from d3etr.data.splits import DetectionSplit
from d3etr.data.teacher_boxes import FoundBoxes
from d3etr.data.transforms import collate
from d3etr.data.views import TeacherViews, batch_records
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.structures import ImageBatch, Targets

logger = get_logger(__name__)

Batch = tuple[ImageBatch, Targets]
_Made = tuple[ImageBatch, Targets, float]
"""A batch, and the CPU seconds that making it took."""


class EpochLoader:
    """Training batches of one worker.

    Args:
        split: the training split, with its images without labels.
        data: transforms, buckets, images without labels in a batch, number of loading processes.
        batch_size: images per optimiser step over all workers and micro-batches.
        parts: micro-batches per optimiser step over all workers.
        rank: this worker.
        world_size: number of workers.
        seed: of the run.
    """

    def __init__(
        self,
        split: DetectionSplit,
        data: DataConfig,
        *,
        batch_size: int,
        parts: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        if batch_size % parts or parts < world_size:
            raise ValueError("batch_size must be a multiple of parts, one for each worker or more")
        self.batch_size, self.parts, self.seed = batch_size, parts, seed
        self.mine = share(parts, rank, world_size)
        self.bucket, self._sides = data.bucket_by_aspect, data.augmentation.shortest_sides
        self._unlabelled = 0 if split.unlabelled is None else data.unlabelled_in(batch_size)
        self._others = 0 if split.unlabelled is None else len(split.unlabelled.records)
        self._labelled = batch_size - self._unlabelled
        self.steps_per_epoch = len(split.records) // self._labelled
        kind = DetectionDataset if split.unlabelled is None else MixedDataset
        self.dataset = kind(
            split,
            data.preprocessing,
            data.augmentation,
            seed=seed,
            cache_bytes=CACHE_BYTES // max(1, data.workers),
        )
        self._distils: Callable[[int], bool] = lambda _: True
        self._strong_steps: int | None = None
        self._static_sizes: NDArray[np.int64] | None = None
        self._source = _BatchSource(self.dataset, data.workers, persistent=True)

    def show_teacher(self, scale: float) -> None:
        """Give batches the teacher's picture too, its sides the student's times ``scale``.

        Before the first epoch: loading processes get a copy of the dataset.
        """
        self.dataset.show_teacher(scale)

    def use_teacher_boxes(self, boxes: Sequence[FoundBoxes]) -> None:
        """Give batches what the teacher has found in each image; as above."""
        self.dataset.teacher_boxes = boxes

    def use_views(self, views: TeacherViews, unlabelled: TeacherViews | None = None) -> None:
        """Show stored views of the images, with what the teacher said about them; as above.

        Args:
            views: of the images with labels.
            unlabelled: of those without, where there are some.
        """
        self.dataset.use_views(views, unlabelled)

    def teach_in(self, steps: Callable[[int], bool]) -> None:
        """Leave out, in other steps, images without labels and what is there of the teacher.

        Args:
            steps: whether an optimiser step of the run, from 0, distils.
        """
        self._distils = steps

    def end_strong(self, step: int) -> None:
        """Leave out what ``off_for_last_epochs`` names, from an optimiser step of the run on."""
        self._strong_steps = step

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """The batches of one epoch: this worker's micro-batches of each optimiser step.

        Args:
            epoch: from 0.
            start_step: steps of this epoch to leave out, without decoding their images.

        Raises:
            UserError: an image is missing or damaged.
        """
        keys = self._keys(epoch)[start_step * len(self.mine) :]
        batches = self._source.batches(keys)
        for _ in range(start_step, self.steps_per_epoch):
            yield [next(batches) for _ in self.mine]

    def take_cpu_seconds(self) -> float:
        """CPU seconds of loading processes behind the batches that came since the last call."""
        return self._source.take_cpu_seconds()

    def close(self) -> None:
        """End the loading processes."""
        self._source.close()

    def _keys(self, epoch: int) -> list[BatchKey]:
        first, each = epoch * self.steps_per_epoch, len(self.mine)
        strong = self.steps_per_epoch
        if self._strong_steps is not None:
            strong = min(strong, max(0, self._strong_steps - first))
        passes = FIRST_PASS
        if self._unlabelled:
            drawn = self.steps_per_epoch * self._unlabelled
            passes = unlabelled_passes(epoch, drawn, self._others)
        sizes = self._sizes(epoch, strong > 0, passes)
        images, shown, order = len(self.dataset), sizes[:, :2], (self.seed, epoch, self.bucket)
        batches = epoch_batches(shown[:images], self._labelled, *order)
        if self._unlabelled:
            batches = add_unlabelled(batches, shown, images, self._unlabelled, passes, *order)
        cut = epoch, self.parts, self.mine, self._labelled
        keys = micro_batches(batches, sizes, *cut)
        if 0 < strong < self.steps_per_epoch:  # the same batches, of images of other sizes
            others = micro_batches(batches, self._sizes(epoch, False, passes), *cut)
            keys[strong * each :] = others[strong * each :]
        keys = [
            self._of_step(key, first + place // each, place // each < strong)
            for place, key in enumerate(self._in_the_row(keys, passes))
        ]
        return [
            key if self._distils(first + place // each) else self._plain(key)
            for place, key in enumerate(keys)
        ]

    def _in_the_row(self, keys: list[BatchKey], passes: range) -> list[BatchKey]:
        """Images without labels numbered through all passes, not from the epoch's first one on."""
        before, images = passes.start * self._others, len(self.dataset)
        rows = [tuple(i + before * (i >= images) for i in key.indices) for key in keys]
        return [replace(key, indices=row) for key, row in zip(keys, rows, strict=True)]

    def _of_step(self, key: BatchKey, step: int, strong: bool) -> BatchKey:
        """The part of a batch as its step shows it, which may have a size of its own."""
        sides, exact = self._sides, self.dataset.preprocessing
        if sides is None or exact.exact_size is None:
            return key if strong else replace(key, shown=Shown(strong=False))
        side = sides[Random(f"size/{self.seed}/{step}").randrange(len(sides))]
        scale, theirs = self.dataset.teacher_scale, None
        if key.teacher_size is not None:
            theirs = output_size(1, 1, exact, side, scale)
        size = output_size(1, 1, exact, side)
        return replace(key, size=size, teacher_size=theirs, shown=Shown(side, strong))

    def _plain(self, key: BatchKey) -> BatchKey:
        """The part of a batch, padded alike, that a step learns from which does not distil."""
        labelled = tuple(index for index in key.indices if index < len(self.dataset))
        return replace(key, indices=labelled, taught=False)

    def _sizes(self, epoch: int, strong: bool, passes: range) -> NDArray[np.int64]:
        if self.dataset.has_random_sizes:
            return self.dataset.sizes(epoch, strong=strong, passes=passes)
        if self._static_sizes is None:
            self._static_sizes = self.dataset.sizes(0)
        known, others = np.split(self._static_sizes, [len(self.dataset)])
        return np.concatenate([known, *[others] * len(passes)])


class EvaluationBatches:
    """One worker's share of a split without augmentation; may be iterated again and again.

    Over all workers every image comes exactly once. Workers may have different numbers of
    batches, and none at all where there are more workers than batches.

    Args:
        split: the images.
        data: transforms, buckets and the number of loading processes.
        batch_size: images of a batch at most.
        rank: this worker.
        world_size: number of workers.
        image_scale: a factor on the sides of the images.
    """

    def __init__(
        self,
        split: DetectionSplit,
        data: DataConfig,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        image_scale: float = 1.0,
    ) -> None:
        cache_bytes = CACHE_BYTES // max(1, data.workers)
        dataset = DetectionDataset(
            split, data.preprocessing, cache_bytes=cache_bytes, image_scale=image_scale
        )
        sizes = dataset.sizes(0)
        self._keys = evaluation_keys(sizes, batch_size, rank, world_size, data.bucket_by_aspect)
        self._source = _BatchSource(dataset, data.workers, persistent=False)

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Batch]:
        return self._source.batches(self._keys)

    def close(self) -> None:
        """End the loading processes of an iteration that was broken off."""
        self._source.close()


class ViewBatches:
    """Batches of chosen images in chosen views, to be shown to the teacher.

    Args:
        split: the training split.
        data: transforms and the number of loading processes.
        seed: of the views.
        scale: the teacher's ``image_scale``.
    """

    def __init__(self, split: DetectionSplit, data: DataConfig, *, seed: int, scale: float) -> None:
        cache = CACHE_BYTES // max(1, data.workers)
        self._dataset = DetectionDataset(
            split, data.preprocessing, data.augmentation, seed=seed, cache_bytes=cache
        )
        self._dataset.teacher_scale = scale
        self._source = _BatchSource(self._dataset, data.workers, persistent=True)

    def plan(self, index: int, view: int) -> Augmentation:
        """What happens to an image in a view."""
        return self._dataset.plan(index, view)

    def sizes(self, view: int) -> NDArray[np.int64]:
        """[images, 2]: (height, width) in pixels of every image in a view, as the teacher sees."""
        return self._dataset.sizes(view)[:, -2:]

    def batches(self, keys: list[BatchKey]) -> Iterator[Batch]:
        """A batch for each key, whose epoch is the view."""
        return self._source.batches(keys)

    def take_cpu_seconds(self) -> float:
        """CPU seconds of loading processes behind the batches that came since the last call."""
        return self._source.take_cpu_seconds()

    def close(self) -> None:
        """End the loading processes."""
        self._source.close()


class _BatchSource:
    """Turns keys into batches, in order, with ``workers`` processes or in this one."""

    def __init__(self, dataset: DetectionDataset, workers: int, *, persistent: bool) -> None:
        self._dataset = _BatchDataset(dataset)
        self._keys: list[BatchKey] = []
        """Of the epoch at hand; persistent loading processes outlive an epoch."""
        self._workers, self._persistent = workers, persistent
        self._loader: DataLoader[Any] | None = None
        self._running: Iterator[Any] | None = None
        self._cpu_seconds = 0.0
        self._warned = False

    def batches(self, keys: list[BatchKey]) -> Iterator[Batch]:
        if not keys:
            return iter(())
        if self._workers == 0:
            return (self._received(self._dataset[key])[:2] for key in keys)
        self._keys[:] = keys
        self._running = iter(self._started())
        return (self._counted(made) for made in self._running)

    def take_cpu_seconds(self) -> float:
        taken, self._cpu_seconds = self._cpu_seconds, 0.0
        return taken

    def _counted(self, made: _Made | bytes | UserError) -> Batch:
        images, targets, seconds = self._received(made)
        self._cpu_seconds += seconds
        return images, targets

    def _received(self, made: _Made | bytes | UserError) -> _Made:
        if isinstance(made, UserError):
            raise made
        if not isinstance(made, bytes):
            return made
        if not self._warned:
            self._warned = True
            logger.warning(
                "shared memory is short (df -h /dev/shm): batches come from loading processes "
                "through pipes, which takes longer. Containers need more of it, for example "
                "docker run --shm-size=2g"
            )
        received: _Made = pickle.loads(made)
        return received

    def close(self) -> None:
        # An exception keeps the frames, and so the iterator, of whoever was iterating.
        running, self._running, self._loader = self._running, None, None
        if running is not None:
            running._shutdown_workers()  # type: ignore[attr-defined]

    def _started(self) -> DataLoader[Any]:
        if self._loader is None:
            self._loader = DataLoader(
                self._dataset,
                batch_size=None,
                sampler=self._keys,
                collate_fn=_unchanged,
                num_workers=self._workers,
                persistent_workers=self._persistent,
                pin_memory=torch.cuda.is_available(),
                multiprocessing_context=safe_context(__name__),
                worker_init_fn=prepare_process,
            )
        return self._loader


class _BatchDataset(Dataset["_Made | bytes | UserError"]):
    """Makes whole batches, so that one message crosses between processes for each."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: BatchKey) -> _Made | bytes | UserError:
        begun = time.process_time()
        try:
            samples = [
                self.dataset.sample(index, key.epoch, taught=key.taught, shown=key.shown)
                for index in key.indices
            ]
        except UserError as error:
            # Raised in the training process: from here it would carry a traceback as text.
            return error
        images, targets = collate(samples, self.dataset.preprocessing, key.size, key.teacher_size)
        records = [sample.stored for sample in samples if sample.stored is not None]
        if records and self.dataset.views is not None:
            shown = key.teacher_size or key.size
            stored = batch_records(records, self.dataset.views.strides, shown)
            images = replace(images, stored=stored)
        made = images, targets, time.process_time() - begun
        shared = images.pixels.is_shared()  # type: ignore[no-untyped-call]
        if get_worker_info() is None or shared:
            return made
        # Tensors always take shared memory between processes, bytes never.
        return pickle.dumps(made)


def _unchanged(batch: Any) -> Any:
    return batch
