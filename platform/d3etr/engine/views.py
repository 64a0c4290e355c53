"""Makes stores of teacher views (``teacher.views``), and opens those that are there.

A store belongs to one teacher, one data set and one augmentation: its folder's name is a digest of
all that its content depends on, so that anything else is another store. The number of views is no
part of it: more views join those that are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d3etr.config.tree import Config
from d3etr.config.views import ViewsConfig
from d3etr.data.file_labels import LABELS_KEY
from d3etr.data.loading import ViewBatches
from d3etr.data.splits import UNLABELLED, DetectionSplit
from d3etr.data.views import (
    RAGGED,
    TeacherViews,
    open_shard,
    shard_path,
    verify_shard,
    view_shards,
    write_shard,
)
from d3etr.engine.build import Models, build_models, open_splits
from d3etr.engine.distributed import TrainContext, run_on_all_workers
from d3etr.engine.journal import Journal
from d3etr.engine.provenance import data_key
from d3etr.engine.run_folder import RunFolder
from d3etr.engine.view_records import ViewTeacher
from d3etr.errors import UserError
from d3etr.files import clear_disk_errors, read_json, write_text
from d3etr.methods.base import Method
from d3etr.methods.stored import StoredParts
from d3etr.progress import OnProgress, PacedProgress, no_progress

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_BYTES = 64 * 2**20
MOST_IMAGES = 512
"""Of a shard: what an interruption costs, and what workers share, is no more than these."""
_OVERHEAD = 1200
"""Bytes of a shard beside its tensors: names, shapes, digest."""
STORING_SECONDS = 10.0
"""How often storing writes a line into the journal."""
_PROGRESS = "storing teacher views, shards"


def require_storable(method: Method, views: ViewsConfig, queries: int) -> None:
    """Refuse what has no stored counterpart.

    Args:
        method: of the run.
        views: what is asked for.
        queries: M of the teacher.

    Raises:
        UserError: naming the setting that helps.
    """
    reasons = []
    if not method.needs_teacher_outputs:
        reasons.append(
            "has no effect: this method uses no outputs of the teacher. Remove teacher.views"
        )
    if method.needs_features:
        helps = "set distillation.features.weight to 0" if method.needs_decoder else "remove it"
        reasons.append(f"cannot hold memory tokens, which this method compares: {helps}")
    if method.draws_in_steps:
        reasons.append(
            "cannot hold general points, which are drawn anew in each step: set "
            "distillation.general_points.count to 0"
        )
    if views.queries is not None and views.queries > queries:
        reasons.append(f".queries is {views.queries}, but the teacher has {queries} queries")
    if reasons:
        raise UserError("; ".join(f"teacher.views{'' if r[0] == '.' else ' '}{r}" for r in reasons))


def prepare_views(
    config: Config,
    split: DetectionSplit,
    models: Models,
    context: TrainContext,
    on_progress: OnProgress = no_progress,
) -> TeacherViews | None:
    """The store of a run, whose missing shards the workers make and whose others they verify.

    All workers call it. Two runs that need the same store may make it at the same time.

    Args:
        config: of the run.
        split: the training split.
        models: the teacher, the method and the digests of what they were read from.
        context: the workers; each makes its share.
        on_progress: called while outputs are stored.

    Returns:
        None where the run asks for none.

    Raises:
        UserError: the store would be too large, a shard is damaged, or outputs cannot be stored.
    """
    views = None if config.teacher is None else config.teacher.views
    if views is None:
        return None

    store = ViewStore(config, split, models, context)
    try:
        return run_on_all_workers(lambda: store.complete(on_progress), context)
    finally:
        store.close()


def store_only(config: Config, run_dir: Path, context: TrainContext) -> dict[str, Any]:
    """Make a run's store, or what is missing of it; all workers call it.

    Args:
        config: of a run with ``teacher.views``.
        run_dir: whose journal is told how far it is.
        context: the workers.

    Returns:
        ``folder``, ``views`` of each image, ``images``, ``bytes`` and ``seconds``.
    """
    begun = time.perf_counter()
    journal = Journal(RunFolder(run_dir).journal, active=context.rank == 0)
    on_progress = PacedProgress(lambda line: journal.message(0, line), 2.0, STORING_SECONDS)
    splits = open_splits(config, context, on_progress)
    models = build_models(config, splits, context)
    try:
        views = prepare_views(config, splits.train, models, context, on_progress)
    finally:
        models.distiller.solver.close()
    assert views is not None
    shards = [path for view in range(views.count) for path in view_shards(views.folder, view)]
    return {
        "folder": str(views.folder),
        "views": views.count,
        "images": len(splits.train.records),
        "bytes": sum(path.stat().st_size for path in shards),
        "seconds": time.perf_counter() - begun,
    }


def store_key(
    config: Config, views: ViewsConfig, models: Models, parts: StoredParts
) -> dict[str, Any]:
    """All that the content of a store depends on, as plain values."""
    data, digests = config.data, models.digests
    images: dict[str, Any] = {
        key: digests.get(key) for key in (data_key("train"), data_key("train", "images"))
    }
    others = (data_key(UNLABELLED), data_key(UNLABELLED, "images"), LABELS_KEY)
    images |= {key: digests[key] for key in others if key in digests}
    if data.labelled_share < 1:
        images["labelled"] = [data.labelled_share, data.labelled_seed]
    return {
        "format": FORMAT,
        "teacher": digests["teacher.weights"],
        "teacher precision": config.teacher_precision,
        "image scale": config.teacher_scale,
        "images": images,
        "preprocessing": data.preprocessing.model_dump(mode="json"),
        "augmentation": data.augmentation.model_dump(mode="json"),
        "seed": views.seed,
        "layers": list(parts.layers),
        "queries": views.queries,
        "attention": parts.attention,
        "precision": views.precision,
    }


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
        split: the training split.
        models: see ``prepare_views``.
        context: the workers.
    """

    def __init__(
        self, config: Config, split: DetectionSplit, models: Models, context: TrainContext
    ) -> None:
        teacher = models.teacher
        assert teacher is not None and config.teacher is not None
        views = config.teacher.views
        assert views is not None
        method = models.distiller.method
        require_storable(method, views, teacher.config.queries)
        parts = StoredParts.of(method, views.queries)
        key = store_key(config, views, models, parts)
        self._key, self._views, self._context = key, views, context
        self._order, self._images = config.run.seed, len(split.records)
        root = config.run.output / "teacher-views" if views.folder is None else views.folder
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.folder = root.absolute() / digest[:16]
        self._batches = ViewBatches(
            split, config.data, seed=views.seed, scale=config.teacher.image_scale
        )
        self._teacher = ViewTeacher(
            teacher,
            self._batches,
            parts,
            getattr(torch, views.precision),
            config.teacher_precision,
            config.evaluation.batch_size,
            context.device,
        )

    def close(self) -> None:
        """End the loading processes."""
        self._batches.close()

    def forecast(self) -> Forecast:
        """How large the store will be, from what the teacher says about one image."""
        [record] = self._teacher.records([0], 0)
        each = sum(value.nbytes for name, value in record.items() if name not in RAGGED)
        token = sum(value[0].nbytes for name, value in record.items() if name in RAGGED)
        tokens = self._tokens() if token else np.zeros((self._views.count, self._images))
        sizes = each + token * tokens + (8 if token else 0)
        count = int(np.clip(SHARD_BYTES // sizes.mean(), 1, MOST_IMAGES))
        starts = range(0, self._images, count)
        total, missing, shards = 0, 0, []
        for view in range(self._views.count):
            for number, start in enumerate(starts):
                size = int(sizes[view, start : start + count].sum()) + _OVERHEAD
                total += size
                if not shard_path(self.folder, view, number).exists():
                    missing += size
                shards.append((view, number))
        return Forecast(total, missing, tuple(shards), count)

    def _tokens(self) -> NDArray[np.int64]:
        """[K, images]: tokens of the teacher's memory of each image in each view."""
        strides = np.array(self._teacher.strides())
        views = range(self._views.count)
        grids = [-(-self._batches.sizes(view)[:, None] // strides[:, None]) for view in views]
        return np.stack([grid.prod(2).sum(1) for grid in grids])

    def complete(self, on_progress: OnProgress) -> TeacherViews:
        """Make what is missing of this worker's share, and verify what is there.

        Raises:
            UserError: it would be too large, a shard is damaged, or outputs cannot be stored.
        """
        forecast = self.forecast()
        self._require_room(forecast)
        views = TeacherViews(
            self.folder,
            self._views.count,
            self._views.seed,
            self._order,
            forecast.shard_images,
            self._teacher.strides(),
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
                images = range(number * count, min((number + 1) * count, self._images))
                write_shard(path, self._teacher.records(images, view))

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

    def _require_room(self, forecast: Forecast) -> None:
        """Refuse a store that is larger than allowed, or than what is free on the disk."""
        limit, folder = self._views.maximum_gigabytes, self.folder
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if forecast.total > limit * 1e9:
            problem = f"above teacher.views.maximum_gigabytes, {limit:g}"
        elif forecast.missing > free:
            problem = f"of which {forecast.missing / 1e9:.3g} are missing and {free / 1e9:.3g} free"
        else:
            return
        smaller = [f"teacher.views.count below {self._views.count}"]
        teacher = self._teacher.teacher
        queries = self._views.queries or teacher.config.queries
        smaller.append(f"teacher.views.queries below {queries}")
        if self._teacher.strides():
            smaller.append(
                "no attention (distillation.self_attention.weight and "
                "distillation.cross_attention.weight 0)"
            )
        if self._views.precision == "float32":
            smaller.append("teacher.views.precision float16")
        raise UserError(
            f"the teacher's outputs for {self._views.count} views of {self._images:,} images take "
            f"{forecast.total / 1e9:.3g} GB in {self.folder}, {problem}. Smaller stores have "
            f"{', '.join(smaller)}"
        )
