"""One store of teacher views: its name, its forecast, and a worker's share in making it.

A store belongs to one teacher, one data set and one augmentation: its folder's name is a digest of
all that its content depends on, so that anything else is another store. The number of views is no
part of it: more views join those that are there. Images with and without labels have a store each,
so that runs with another share of labels, or without the others, share what they can.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d3etr.config.base import Section
from d3etr.config.data import STRONG
from d3etr.config.tree import Config
from d3etr.data.file_labels import LABELS_KEY
from d3etr.data.loading import ViewBatches
from d3etr.data.splits import UNLABELLED, DetectionSplit
from d3etr.data.views import (
    RAGGED,
    TeacherViews,
    open_shard,
    shard_path,
    verify_shard,
    write_shard,
)
from d3etr.detectors.base import DetectionTransformer
from d3etr.engine.distributed import TrainContext
from d3etr.engine.provenance import data_key
from d3etr.engine.view_records import ViewTeacher
from d3etr.errors import UserError
from d3etr.files import clear_disk_errors, read_json, write_text
from d3etr.methods.base import Method
from d3etr.methods.stored import StoredParts
from d3etr.progress import OnProgress
from d3etr.timing import seconds_on

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_BYTES = 64 * 2**20
MOST_IMAGES = 512
"""Of a shard: what an interruption costs, and what workers share, is no more than these."""
TIMED_IMAGES = 64
"""By which the time of a whole store is told."""
_OVERHEAD = 1200
"""Bytes of a shard beside its tensors: names, shapes, digest."""
_PROGRESS = "storing teacher views, shards"


@dataclass(frozen=True)
class Forecast:
    """How large a store will be.

    Attributes:
        total: bytes of all its shards.
        missing: bytes of those that are not there yet.
        shards: (view, number) of each shard.
        shard_images: images of a shard.
    """

    total: int
    missing: int
    shards: tuple[tuple[int, int], ...]
    shard_images: int


class ViewStore:
    """One worker's side of a store: forecasts it, makes and verifies its share.

    Args:
        config: of the run.
        split: the training split, or its images without labels.
        teacher: on the worker's device.
        method: says what of its outputs is needed.
        digests: of what teacher and split were read from.
        context: the workers.

    Attributes:
        folder: of the store.
        split: as given.
        views: the run's settings.
        count: K, views of each image.
        teacher: what looks at the views.
    """

    def __init__(
        self,
        config: Config,
        split: DetectionSplit,
        teacher: DetectionTransformer,
        method: Method,
        digests: Mapping[str, str],
        context: TrainContext,
    ) -> None:
        assert config.teacher is not None and config.teacher.views is not None
        views, parts = config.teacher.views, StoredParts.of(method, config.teacher.views.queries)
        without = split.name == UNLABELLED
        self.split, self.views = split, views
        self.count = views.of_unlabelled if without else views.count
        # No seed of views or runs is negative: images with and without labels draw apart.
        self._seed, self._order = (
            -1 - seed if without else seed for seed in (views.seed, config.run.seed)
        )
        self._key = store_key(config, split, self._seed, parts, digests)
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        root = config.run.output / "teacher-views" if views.folder is None else views.folder
        self.folder, self._context = root.absolute() / digest[:16], context
        self._batches = ViewBatches(
            split, config.data, seed=self._seed, scale=config.teacher.image_scale
        )
        self.teacher = ViewTeacher(
            teacher,
            self._batches,
            parts,
            getattr(torch, views.precision),
            config.teacher_precision,
            config.evaluation.batch_size,
            context.device,
        )

    def __str__(self) -> str:
        views, without = "views" if self.count > 1 else "view", self.split.name == UNLABELLED
        kind = "images without labels" if without else "images"
        return f"{self.count} {views} of {len(self.split.records):,} {kind}"

    def close(self) -> None:
        """End the loading processes."""
        self._batches.close()

    def forecast(self) -> Forecast:
        """How large the store will be, from how much the teacher says about one image."""
        images, sizes = len(self.split.records), self._record_bytes()
        # Of the first view alone: with more views, shards hold the images that they held before.
        each = int(np.clip(SHARD_BYTES // sizes[0].mean(), 1, MOST_IMAGES))
        total, missing, shards = 0, 0, []
        for view in range(self.count):
            for number, start in enumerate(range(0, images, each)):
                size = int(sizes[view, start : start + each].sum()) + _OVERHEAD
                total += size
                if not shard_path(self.folder, view, number).exists():
                    missing += size
                shards.append((view, number))
        return Forecast(total, missing, tuple(shards), each)

    def seconds(self) -> float:
        """What decoding all images in all views and the teacher's passes over them take.

        By the clock of steps, from some images spread over the split; nothing is written.
        """
        every = max(1, len(self.split.records) // TIMED_IMAGES)
        images = range(0, len(self.split.records), every)[:TIMED_IMAGES]
        device = self._context.device
        self.teacher.records(images[: self.teacher.batch_size], 0)  # starts the loading processes
        self._batches.take_cpu_seconds()
        begun = seconds_on(device)
        self.teacher.records(images, 0)
        taken = seconds_on(device) - begun
        if device.type != "cuda":
            taken += self._batches.take_cpu_seconds()
        return taken / len(images) * len(self.split.records) * self.count

    def _record_bytes(self) -> NDArray[np.float64]:
        """[K, images]: bytes of each image's record in each view."""
        shown, strides = self._batches.sizes, np.array(self.teacher.strides())
        record = self.teacher.blank_record(shown(0)[0])
        each = sum(value.nbytes for name, value in record.items() if name not in RAGGED)
        token = sum(value[0].nbytes for name, value in record.items() if name in RAGGED)
        if not token:
            return np.full((self.count, len(self.split.records)), float(each))
        grids = [-(-shown(view)[:, None] // strides[:, None]) for view in range(self.count)]
        tokens = np.stack([grid.prod(2).sum(1) for grid in grids])
        sizes: NDArray[np.float64] = each + 8.0 + token * tokens
        return sizes

    def complete(self, forecast: Forecast, on_progress: OnProgress) -> TeacherViews:
        """Make what is missing of this worker's share, and verify what is there.

        Args:
            forecast: of this store.
            on_progress: called while outputs are stored.

        Raises:
            UserError: a shard is damaged, or outputs cannot be stored.
        """
        views = TeacherViews(
            self.folder,
            self.count,
            self._seed,
            self._order,
            forecast.shard_images,
            self.teacher.strides(),
        )
        with clear_disk_errors("the teacher's outputs", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._keep_manifest()
            mine = forecast.shards[self._context.rank :: self._context.world_size]
            there = [shard for shard in mine if shard_path(self.folder, *shard).exists()]
            for shard in there:
                verify_shard(shard_path(self.folder, *shard))
            open_shard.cache_clear()  # what this process has read may have been replaced
            self._make([shard for shard in mine if shard not in there], views, on_progress)
        return views

    def _make(
        self, shards: Sequence[tuple[int, int]], views: TeacherViews, on_progress: OnProgress
    ) -> None:
        # Where several runs make one store, each begins elsewhere.
        first = os.getpid() % max(1, len(shards))
        for done, (view, number) in enumerate([*shards[first:], *shards[:first]]):
            on_progress(_PROGRESS, done, len(shards))
            path, count = shard_path(self.folder, view, number), views.shard_images
            if not path.exists():
                end = min((number + 1) * count, len(self.split.records))
                write_shard(path, self.teacher.records(range(number * count, end), view))

    def _keep_manifest(self) -> None:
        """Write down what the store depends on, for people and against accidents."""
        path = self.folder / MANIFEST
        if path.exists() and read_json(path) != self._key:
            raise UserError(
                f"{path} describes another store than its folder's name: remove the folder and run "
                "the same command again, which makes it anew"
            )
        if self._context.rank == 0 and not path.exists():
            write_text(path, json.dumps(self._key, indent=1) + "\n")


_LATER = frozenset({"exact_size", *STRONG, "off_for_last_epochs"})
"""Keys of later versions: unset, they are no part of a name, and earlier stores keep theirs."""


def _named(section: Section) -> dict[str, Any]:
    """A section as part of a store's name."""
    values = section.model_dump(mode="json")
    return {key: value for key, value in values.items() if value or key not in _LATER}


def store_key(
    config: Config,
    split: DetectionSplit,
    seed: int,
    parts: StoredParts,
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """All that the content of a store depends on, as plain values.

    Args:
        config: of the run.
        split: the training split, or its images without labels.
        seed: of the views.
        parts: what is kept of the teacher's outputs.
        digests: of what teacher and split were read from.
    """
    data, rest = config.data, config.data.unlabelled and config.data.unlabelled.rest_of_train
    assert config.teacher is not None and config.teacher.views is not None
    images: dict[str, Any] = {
        key: digests.get(key) for key in (data_key(split.name), data_key(split.name, "images"))
    }
    if split.parts:  # all have labels, some of them of a file
        others = (data_key(UNLABELLED), data_key(UNLABELLED, "images"), LABELS_KEY)
        images |= {key: digests[key] for key in others if key in digests}
    if data.labelled_share < 1 and (split.name != UNLABELLED or rest):
        images["labelled"] = [data.labelled_share, data.labelled_seed]
    return {
        "format": FORMAT,
        "teacher": digests["teacher.weights"],
        "teacher precision": config.teacher_precision,
        "image scale": config.teacher_scale,
        "images": images,
        "preprocessing": _named(data.preprocessing),
        "augmentation": _named(data.augmentation),
        "seed": seed,
        "layers": list(parts.layers),
        "queries": config.teacher.views.queries,
        "attention": parts.attention,
        **({"distributions": True} if parts.distributions else {}),  # no new name for other stores
        "precision": config.teacher.views.precision,
    }
