"""Makes the stores of teacher views that a run asks for (``teacher.views``), or forecasts them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d3etr.config.data import DataConfig
from d3etr.config.tree import Config
from d3etr.config.views import ViewsConfig
from d3etr.data.digit_scenes import find_damage, scenes_folder
from d3etr.data.splits import DetectionSplit, open_split
from d3etr.data.views import TeacherViews, view_shards
from d3etr.detectors.weights import load_weights
from d3etr.engine.build import Models, build_models, open_splits
from d3etr.engine.distributed import SingleProcess, TrainContext, run_on_all_workers
from d3etr.engine.journal import Journal
from d3etr.engine.provenance import data_digests, weight_digests
from d3etr.engine.run_folder import RunFolder
from d3etr.engine.view_store import Forecast, ViewStore
from d3etr.errors import UserError
from d3etr.methods.base import Method
from d3etr.progress import OnProgress, PacedProgress, no_progress
from d3etr.registry import METHODS
from d3etr.storage.fetch import local_file

STORING_SECONDS = 10.0
"""How often storing writes a line into the journal."""


class NoRoomError(UserError):
    """Stores would be larger than allowed, or than what is free on the disk."""


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
    if method.makes_queries_of_objects:
        reasons.append("cannot hold queries made of objects, which this method compares: remove it")
    if method.needs_features:
        by_key = method.needs_decoder and not method.makes_queries_of_objects
        helps = "set distillation.features.weight to 0" if by_key else "remove it"
        reasons.append(f"cannot hold memory tokens, which this method compares: {helps}")
    if method.draws_in_steps:
        reasons.append(
            "cannot hold general points, which are drawn anew in each step: set "
            "distillation.general_points.count to 0"
        )
    if method.needs_scores:
        reasons.append(
            "cannot hold the scores of an encoder's tokens: set distillation.selection.weight to 0"
        )
    if method.denoising is not None:
        reasons.append(
            "cannot hold denoising queries, which are drawn anew in each step: set "
            "distillation.denoising_points.weight to 0"
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
) -> tuple[TeacherViews, ...]:
    """The stores of a run, whose missing shards the workers make and whose others they verify.

    All workers call it. Two runs that need the same store may make it at the same time.

    Args:
        config: of the run.
        split: the training split, with its images without labels.
        models: the teacher, the method and the digests of what they were read from.
        context: the workers; each makes its share.
        on_progress: called while outputs are stored.

    Returns:
        Of the images with labels, then of those without, where there are some; empty where the
        run asks for none.

    Raises:
        UserError: the stores would be too large, a shard is damaged, or outputs cannot be stored.
    """
    if config.teacher is None or config.teacher.views is None:
        return ()
    stores = _stores(config, split, models, context)

    def complete() -> tuple[TeacherViews, ...]:
        forecasts = [store.forecast() for store in stores]
        _require_room(stores, forecasts)
        pairs = zip(stores, forecasts, strict=True)
        return tuple(store.complete(forecast, on_progress) for store, forecast in pairs)

    try:
        return run_on_all_workers(complete, context)
    finally:
        for store in stores:
            store.close()


def storing_seconds(
    config: Config, split: DetectionSplit, models: Models, context: TrainContext
) -> float:
    """What making all stores of a run takes where nothing is stored yet; 0 where it asks for none.

    It is measured on some images, so that whoever shares a store with others, or finds it made,
    has the same seconds as if it were alone.

    Args:
        config: of the run.
        split: the training split, with its images without labels.
        models: the teacher, the method and the digests of what they were read from.
        context: one worker.
    """
    if config.teacher is None or config.teacher.views is None:
        return 0.0
    stores = _stores(config, split, models, context)
    try:
        return sum(store.seconds() for store in stores)
    finally:
        for store in stores:
            store.close()


def _stores(
    config: Config, split: DetectionSplit, models: Models, context: TrainContext
) -> list[ViewStore]:
    """A run's stores, not made yet.

    Raises:
        UserError: the method compares what cannot be stored.
    """
    assert models.teacher is not None
    assert config.teacher is not None and config.teacher.views is not None
    method = models.distiller.method
    require_storable(method, config.teacher.views, models.teacher.config.queries)
    given = models.teacher, method, models.digests, context
    return [ViewStore(config, part, *given) for part in _parts(split)]


def _parts(split: DetectionSplit) -> list[DetectionSplit]:
    """What has a store each: the images with labels, and those without where there are some."""
    return [split] if split.unlabelled is None else [split, split.unlabelled]


def _is_here(split: DetectionSplit) -> bool:
    """Whether all images are on this machine, so that their content is known."""
    return all(part.images.is_readable for part in split.parts or (split,))


def _require_room(stores: Sequence[ViewStore], forecasts: Sequence[Forecast]) -> None:
    """Refuse stores that are larger than allowed, or than what is free on the disk.

    Raises:
        NoRoomError: naming what would make them smaller.
    """
    teacher, views, folder = stores[0].teacher, stores[0].views, stores[0].folder.parent
    total, missing = (sum(getattr(f, key) for f in forecasts) for key in ("total", "missing"))
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if total > views.maximum_gigabytes * 1e9:
        problem = f"above teacher.views.maximum_gigabytes, {views.maximum_gigabytes:g}"
    elif missing > free:
        problem = f"of which {missing / 1e9:.3g} are missing and {free / 1e9:.3g} free"
    else:
        return
    counts = {"count": views.count}
    if len(stores) > 1:
        counts["unlabelled_count"] = views.of_unlabelled
    smaller = [f"teacher.views.{key} below {count}" for key, count in counts.items() if count > 1]
    queries = views.queries or teacher.teacher.config.queries
    smaller.append(f"teacher.views.queries below {queries}")
    if teacher.strides():
        smaller.append(
            "no attention (distillation.self_attention.weight and "
            "distillation.cross_attention.weight 0)"
        )
    if views.precision == "float32":
        smaller.append("teacher.views.precision float16")
    raise NoRoomError(
        f"the teacher's outputs for {' and '.join(map(str, stores))} take {total / 1e9:.3g} GB in "
        f"{folder}, {problem}. Smaller stores have {', '.join(smaller)}"
    )


def store_only(config: Config, run_dir: Path, context: TrainContext) -> dict[str, Any]:
    """Make a run's stores, or what is missing of them; all workers call it.

    Args:
        config: of a run with ``teacher.views``.
        run_dir: whose journal is told how far it is.
        context: the workers.

    Returns:
        ``stores``, of images with labels and then of those without: each ``folder``, ``views`` of
        an image, ``images`` and ``bytes``; and the ``seconds`` that it took.
    """
    begun = time.perf_counter()
    journal = Journal(RunFolder(run_dir).journal, active=context.rank == 0)
    on_progress = PacedProgress(lambda line: journal.message(0, line), 2.0, STORING_SECONDS)
    splits = open_splits(config, context, on_progress)
    models = build_models(config, splits, context)
    try:
        made = prepare_views(config, splits.train, models, context, on_progress)
    finally:
        models.distiller.solver.close()
    stores = []
    for views, split in zip(made, _parts(splits.train), strict=True):
        shards = [path for view in range(views.count) for path in view_shards(views.folder, view)]
        size = sum(path.stat().st_size for path in shards)
        about = {"folder": str(views.folder), "views": views.count, "images": len(split.records)}
        stores.append(about | {"bytes": size})
    return {"stores": stores, "seconds": time.perf_counter() - begun}


@dataclass(frozen=True)
class StoreForecast:
    """What a dry run says about a store.

    Attributes:
        folder: of the store; None where it depends on images that are not on this machine.
        views: of each image.
        images: of the store.
        bytes: of the whole store.
        missing: bytes that are not stored yet; all where the folder is not known.
    """

    folder: str | None
    views: int
    images: int
    bytes: int
    missing: int


def forecast_views(config: Config) -> tuple[StoreForecast, ...] | None:
    """How large a run's stores will be, and what of them is there; writes nothing.

    Returns:
        Of the images with labels, then of those without; empty where the run stores none, None
        where that is not known as digit scenes are not written yet.

    Raises:
        NoRoomError: the stores would be too large.
        UserError: images or weights cannot be read.
    """
    if config.teacher is None or config.teacher.views is None or config.teacher.weights is None:
        return ()
    if not _scenes_are_written(config.data):
        return None
    split = open_split(config.data, "train", fetch=False)
    with local_file(config.teacher.weights) as file:
        teacher, _ = load_weights(file)
    kind: type[Method] = METHODS.find(config.distillation.method)
    method = kind(config.distillation, config.student.detector, teacher.config, seed=0)
    digests = weight_digests(config) | data_digests(split)
    context = SingleProcess(torch.device("cpu"))
    stores = [ViewStore(config, part, teacher, method, digests, context) for part in _parts(split)]
    forecasts = [store.forecast() for store in stores]
    _require_room(stores, forecasts)
    return tuple(
        StoreForecast(
            str(store.folder) if _is_here(store.split) else None,
            store.count,
            len(store.split.records),
            forecast.total,
            forecast.missing,
        )
        for store, forecast in zip(stores, forecasts, strict=True)
    )


def _scenes_are_written(data: DataConfig) -> bool:
    """Whether the digit scenes to train on, where they are the data, are there and whole."""
    beside = None if data.unlabelled is None else data.unlabelled.digit_scenes
    scenes = [config for config in (data.digit_scenes, beside) if config is not None]
    return all(find_damage(scenes_folder(config), ["train"]) is None for config in scenes)
