"""From a configuration to everything that a run needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.optim import AdamW

from d3etr.config.tree import Config
from d3etr.data.judgement import judge
from d3etr.data.loading import EpochLoader
from d3etr.data.splits import DetectionSplit, open_split
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.foundation import FoundationModel, load_foundation
from d3etr.detectors.weights import WeightsInfo, load_weights
from d3etr.distiller import Distiller
from d3etr.engine.distributed import TrainContext, run_on_all_workers
from d3etr.engine.ema import WeightAverage
from d3etr.engine.init_student import build_student
from d3etr.engine.journal import Journal
from d3etr.engine.optimiser import build_optimiser
from d3etr.engine.provenance import (
    data_digests,
    ensure_same_everywhere,
    remote_files,
    remote_folders,
    weight_digests,
)
from d3etr.engine.run_folder import RunFolder
from d3etr.engine.seeding import derive_seed, seed_generators
from d3etr.engine.teacher import (
    check_same_classes,
    check_same_input,
    foundation_folder,
    teacher_boxes,
)
from d3etr.progress import OnProgress
from d3etr.storage.fetch import fetch_file, local_file


@dataclass(frozen=True)
class Splits:
    """The image sets of a run; ``test`` only if it is measured.

    ``warnings``: what data and recipe could have better.
    """

    train: DetectionSplit
    validation: DetectionSplit
    test: DetectionSplit | None
    warnings: tuple[str, ...] = ()

    def by_name(self) -> dict[str, DetectionSplit]:
        """Those that are there."""
        splits = {"train": self.train, "validation": self.validation}
        return splits if self.test is None else splits | {"test": self.test}


@dataclass(frozen=True)
class Models:
    """Student, teacher, and the state around them.

    Attributes:
        student: on the worker's device.
        teacher: frozen, on the worker's device; None for plain training, and where what teaches
            is no detector.
        teacher_info: the metadata of its weights file.
        distiller: student and losses.
        optimiser: of the distiller's parameters.
        average: of the student's weights, if configured.
        digests: what a resume must find unchanged: name -> SHA-256.
    """

    student: DetectionTransformer
    teacher: DetectionTransformer | None
    teacher_info: WeightsInfo | None
    distiller: Distiller
    optimiser: AdamW
    average: WeightAverage | None
    digests: dict[str, str]


@dataclass
class Run:
    """What the parts of one training run share.

    Attributes:
        step: optimiser steps done.
    """

    config: Config
    folder: RunFolder
    context: TrainContext
    journal: Journal
    splits: Splits
    models: Models
    step: int = 0

    def warn(self, text: str, **fields: str) -> None:
        """Write a warning into the journal, with further fields of its record."""
        self.journal.message(self.step, text, "warning", **fields)


def open_splits(
    config: Config, context: TrainContext, on_progress: OnProgress | None = None
) -> Splits:
    """Open the run's image sets; worker 0 first, as it may have to make the embedded ones.

    What URLs name is fetched before training: a file that is missing stops the run at its start,
    epochs take the same time, and a storage that goes away costs nothing. The first worker of a
    machine fetches, the others find it in the cache.

    Args:
        config: the run.
        context: the workers.
        on_progress: called while files are fetched.

    Raises:
        UserError: anything is wrong with them, or the recipe contradicts them.
    """

    def read() -> Splits:
        return Splits(
            open_split(config.data, "train", on_progress),
            open_split(config.data, "validation", on_progress),
            open_split(config.data, "test", on_progress) if config.evaluation.test else None,
        )

    files = remote_files(config)
    if files:
        urls = files.values()
        run_on_all_workers(lambda: [fetch_file(url, on_progress) for url in urls], context)
    if remote_folders(config):
        splits = run_on_all_workers(read, context)
    else:
        if context.rank != 0:
            context.barrier()
        splits = read()
        if context.rank == 0:
            context.barrier()
    judgement = judge(config, splits.by_name())
    judgement.raise_errors()
    return replace(splits, warnings=judgement.warnings)


def open_loader(
    config: Config, split: DetectionSplit, context: TrainContext, steps: int | None = None
) -> EpochLoader:
    """This worker's training batches.

    Args:
        config: of the run.
        split: the training split.
        context: the workers.
        steps: of the whole run; None: as configured.
    """
    loader = EpochLoader(
        split,
        config.data,
        batch_size=config.optimisation.batch_size,
        parts=config.micro_batches(context.world_size),
        rank=context.rank,
        world_size=context.world_size,
        seed=config.run.seed,
    )
    steps = steps or config.optimisation.total_steps(loader.steps_per_epoch)
    loader.teach_in(partial(config.distillation.distils_at, steps=steps))
    if epochs := config.data.augmentation.off_for_last_epochs:
        loader.end_strong(steps - epochs * loader.steps_per_epoch)
    loader.show_teacher(config.teacher_scale)
    boxes = teacher_boxes(config, split)
    if boxes is not None:
        loader.use_teacher_boxes(boxes)
    return loader


def build_models(config: Config, splits: Splits, context: TrainContext) -> Models:
    """Build student, teacher, distiller and optimiser; every worker builds the same.

    Raises:
        UserError: weights are missing or do not fit; teacher and data or teacher and student
            do not go together.
    """
    _seed(config, "student")
    student = build_student(config, splits.train.categories, quiet=context.rank != 0)
    student = student.to(context.device)
    teacher, info = _load_teacher(config, splits.train, context)
    foundation = _load_foundation(config, context)
    _seed(config, "distiller")
    distiller = Distiller(
        student,
        teacher if foundation is None else foundation,
        config.distillation,
        config.optimisation.set_criterion,
        seed=derive_seed(config.run.seed, "queries"),
    ).to(context.device)
    if config.optimisation.compile:
        for detector in (student, teacher):
            if detector is not None:
                compile_detector(detector)
    if config.teacher is not None and config.teacher.views and config.teacher.views.queries:
        distiller.method.groups_need_images = True  # each image has its own of the teacher's
    digests = weight_digests(config)
    for split in splits.by_name().values():
        digests |= data_digests(split)
    ensure_same_everywhere(digests, context)
    # First, as it may freeze the backbone: what is frozen has no average and no gradient.
    named = student.named_parameters()
    inherited = frozenset(id(p) for name, p in named if name in student.inherited)
    optimiser = build_optimiser(
        distiller, student.backbone, config.optimisation, student.config.sampling_parts, inherited
    )
    decay = config.optimisation.ema_decay
    average = None if decay is None else WeightAverage(student, decay)
    return Models(student, teacher, info, distiller, optimiser, average, digests)


def _load_teacher(
    config: Config, split: DetectionSplit, context: TrainContext
) -> tuple[DetectionTransformer | None, WeightsInfo | None]:
    if config.teacher is None or config.teacher.weights is None:
        return None, None
    with local_file(config.teacher.weights) as file:
        teacher, info = load_weights(file)
    check_same_classes(info, config.teacher.weights, split)
    check_same_input(info, config.teacher.weights, config.data)
    return teacher.to(context.device).requires_grad_(False), info


def _load_foundation(config: Config, context: TrainContext) -> FoundationModel | None:
    folder = foundation_folder(config)
    return None if folder is None else load_foundation(folder).to(context.device)


def _seed(config: Config, purpose: str) -> None:
    """Initial weights are drawn on the CPU, the same for every device."""
    seed_generators(derive_seed(config.run.seed, purpose), torch.device("cpu"))


def compile_detector(detector: DetectionTransformer, mode: str = "default") -> None:
    """Compile ``encode`` and ``decode`` of a detector in place; training does not call ``forward``.

    ``mode`` is torch.compile's.
    """
    for name in ("encode", "decode"):
        setattr(detector, name, torch.compile(getattr(detector, name), mode=mode))
