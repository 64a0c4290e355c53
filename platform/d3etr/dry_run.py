"""What a run would do, found out without a GPU, a cluster or a single training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from d3etr.config.detector import DetectorConfig, TeacherConfig
from d3etr.config.infrastructure import ClusterConfig, RunConfig
from d3etr.config.load import plain_tree, to_yaml
from d3etr.config.tree import Config
from d3etr.detectors.build import build_detector, count_parameters
from d3etr.detectors.foundation_folder import read_foundation_folder
from d3etr.engine.find_run import folder_of
from d3etr.engine.preflight import judge_beginning
from d3etr.engine.provenance import remote_files
from d3etr.engine.views import StoreForecast, forecast_views
from d3etr.errors import UserError
from d3etr.launch.api import LauncherName
from d3etr.launch.ray_environment import joined_address
from d3etr.launch.resources import demand_of, this_machine
from d3etr.launch.resources import describe as describe_nodes
from d3etr.storage.fetch import cache_folder

MOST_CHECKPOINTS = 100_000
SHOWN_CHECKPOINTS = 4
"""So many of a long list of checkpoints are named."""


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Attributes:
        run_dir: its folder.
        images: training images with labels.
        unlabelled: those without that are trained on beside them.
        classes: object classes C.
        student_parameters: trained and frozen ones.
        teacher_parameters: None without a teacher.
        steps_per_epoch: optimiser steps.
        steps: optimiser steps of the whole run.
        distilled_steps: those of them that use the teacher.
        checkpoints: the steps after which one is written; ``run.keep_checkpoints`` stay.
        warnings: what the run would warn of at its start.
        views: the stores of ``teacher.views``; None where they are not known yet.
    """

    run_dir: Path
    images: int
    unlabelled: int
    classes: int
    student_parameters: int
    teacher_parameters: int | None
    steps_per_epoch: int
    steps: int
    distilled_steps: int
    checkpoints: tuple[int, ...]
    warnings: tuple[str, ...] = ()
    views: tuple[StoreForecast, ...] | None = ()


def make_plan(config: Config) -> Plan:
    """Work out the size of a run; reads annotation and weights files, writes nothing.

    Files that URLs name are fetched into the cache for that, images are not.

    Raises:
        UserError: the images, their annotations or the teacher would stop the run.
    """
    begun = judge_beginning(config)
    images, classes, teacher = begun.images, begun.classes, begun.teacher
    per_epoch = config.steps_per_epoch(images)
    steps = config.optimisation.total_steps(per_epoch)
    return Plan(
        run_dir=folder_of(config).path,
        images=images,
        unlabelled=begun.unlabelled,
        classes=classes,
        student_parameters=_parameters(config.student.detector, classes),
        teacher_parameters=(
            None if teacher is None else _parameters(teacher.detector, len(teacher.categories))
        ),
        steps_per_epoch=per_epoch,
        steps=steps,
        distilled_steps=config.distillation.distilled_steps(steps),
        checkpoints=_checkpoint_steps(config.run, per_epoch, steps),
        warnings=begun.warnings,
        views=forecast_views(config),
    )


def describe(config: Config, launcher: LauncherName = "ray") -> str:
    """The resolved configuration and the size of the run, for people.

    Args:
        config: the run.
        launcher: what would start it.

    Raises:
        UserError: see ``make_plan``.
    """
    plan = make_plan(config)
    epochs = plan.steps / plan.steps_per_epoch
    saved = [str(step) for step in plan.checkpoints]
    if len(saved) > SHOWN_CHECKPOINTS:
        saved = [*saved[: SHOWN_CHECKPOINTS - 1], "...", saved[-1]]
    end = "Nothing was started or written."
    if remote_files(config):
        place = cache_folder()
        end = f"Nothing was started; annotations and weights are in the cache {place}."
    lines = [
        to_yaml(config),
        f"run folder   {plan.run_dir}",
        f"data         {plan.images:,} training images{_beside(plan.unlabelled)}, "
        f"{plan.classes} classes",
        f"student      {_millions(plan.student_parameters)}",
        f"teacher      {_teacher(plan, config.teacher)}",
        f"length       {plan.steps:,} steps, {epochs:.3g} epochs of {plan.steps_per_epoch:,}",
        *_distilled(plan),
        *_views(plan.views),
        f"checkpoints  {len(plan.checkpoints)}, after step {', '.join(saved)}; the newest "
        f"{config.run.keep_checkpoints} are kept",
        *_cluster(config.cluster, launcher),
        *(f"warning      {text}" for text in plan.warnings),
        end,
    ]
    return "\n".join(lines)


def describe_json(config: Config) -> dict[str, Any]:
    """What ``describe`` says, as plain values.

    Raises:
        UserError: see ``make_plan``.
    """
    plan = make_plan(config)
    return {"config": plain_tree(config)} | asdict(plan) | {"run_dir": str(plan.run_dir)}


def _distilled(plan: Plan) -> list[str]:
    """How many steps distil, where some do and others do not."""
    if plan.distilled_steps in (0, plan.steps):
        return []
    return [f"distilled    {plan.distilled_steps:,} of the steps; the others are plain ones"]


def _views(stores: Sequence[StoreForecast] | None) -> list[str]:
    """What is stored of the teacher, how large it is, and whether it is there."""
    if stores is None:
        return ["views        of digit scenes that are not written yet: their size is known then"]
    lines = []
    for store, what in zip(stores, ("", " without labels"), strict=False):
        there = f"{_megabytes(store.missing)} of it to be stored in {store.folder}"
        if store.folder is None:
            there = "to be stored, unless it was before: the images are not here"
        elif not store.missing:
            there = f"stored in {store.folder}"
        images = f"{store.views} of {store.images:,} images{what}"
        lines.append(f"views        {images}, {_megabytes(store.bytes)}, {there}")
    return lines


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _beside(unlabelled: int) -> str:
    return f" and {unlabelled:,} without labels" if unlabelled else ""


def _cluster(cluster: ClusterConfig, launcher: LauncherName) -> list[str]:
    """What Ray is asked for; of a cluster that is joined it is not known here whether it fits."""
    if launcher != "ray":
        return []
    address = joined_address(cluster)
    nodes = [] if address is not None else [this_machine()]
    demand = demand_of(cluster, nodes)
    if address is None:
        return [f"cluster      {demand}, here ({describe_nodes(nodes)})"]
    gpus = " (and 1 GPU each, where it has so many)" if cluster.gpus_per_worker == "auto" else ""
    return [f"cluster      needs {demand}{gpus} at {address}, which a dry run does not ask"]


def _checkpoint_steps(run: RunConfig, per_epoch: int, steps: int) -> tuple[int, ...]:
    every = per_epoch * run.checkpoint_every_epochs
    count = steps // min(every, run.checkpoint_every_steps or every)
    if count > MOST_CHECKPOINTS:
        raise UserError(
            f"{steps:,} steps would write {count:,} checkpoints: save more rarely with "
            "run.checkpoint_every_epochs or run.checkpoint_every_steps, or train shorter"
        )
    saved = {*range(every, steps, every), steps}
    if run.checkpoint_every_steps is not None:
        saved |= {*range(run.checkpoint_every_steps, steps, run.checkpoint_every_steps)}
    return tuple(sorted(saved))


def _parameters(config: DetectorConfig, classes: int) -> int:
    with torch.device("meta"):
        return count_parameters(build_detector(config, classes))


def _teacher(plan: Plan, teacher: TeacherConfig | None) -> str:
    """How large the teacher is and how large it sees images, or where its boxes are."""
    if teacher is not None and teacher.detections is not None:
        return f"boxes in {', '.join(map(str, teacher.detections))}"
    size = _millions(plan.teacher_parameters)
    if teacher is not None and teacher.features is not None:
        folder = read_foundation_folder(teacher.features)
        size = f"features of a {folder.kind}, licence {folder.licence or 'not found'}"
    if teacher is None or teacher.image_scale == 1:
        return size
    return f"{size}, sees images {teacher.image_scale:g} times as large as the student"


def _millions(parameters: int | None) -> str:
    return "none" if parameters is None else f"{parameters / 1e6:.2f} M parameters"
