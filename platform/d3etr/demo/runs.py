"""The demonstration's four runs: a teacher, and students of the same data, detector and seed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from d3etr.config.load import load_config
from d3etr.config.overrides import as_overrides
from d3etr.config.shipped import recipes_folder
from d3etr.config.tree import Config
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.demo.shipped import measure_shipped
from d3etr.detectors.weights import file_digest
from d3etr.engine.find_run import folder_of
from d3etr.engine.pretraining import pretrain_backbone
from d3etr.errors import UserError
from d3etr.launch.api import LauncherName, launch
from d3etr.launch.driver import RunResult
from d3etr.progress import OnProgress, no_progress

TEACHER_WEIGHTS = Path("weights", "digits-teacher.safetensors")


@dataclass(frozen=True)
class DemoRun:
    """One of the four.

    Attributes:
        title: for people.
        config: what was run.
        result: what came out.
    """

    title: str
    config: Config
    result: RunResult


def run_demo(
    *,
    train_teacher: bool = False,
    launcher: LauncherName = "ray",
    overrides: Sequence[str] = (),
    on_progress: OnProgress = no_progress,
) -> list[DemoRun]:
    """Teacher, plain, inherited and D3ETR student; runs that are finished are not repeated.

    The inherited student starts from the teacher's decoder, as the D3ETR student does, and is
    otherwise plain; it trains for the time that the D3ETR student takes.

    Args:
        train_teacher: train the teacher instead of measuring the shipped one.
        launcher: who trains.
        overrides: ``a.b=c`` texts for all four.
        on_progress: takes a sentence about what comes next.

    Returns:
        The four runs in that order.

    Raises:
        UserError: recipes or weights are not where they should be, or a run cannot start.
    """
    shipped = None if train_teacher else _shipped_weights()
    # A run's folder is known before it starts: all are validated before any does.
    # Other shipped weights are another run, and what they teach is another student.
    named = [] if shipped is None else [f"run.name=digits-teacher-{file_digest(shipped)[:8]}"]
    teacher = _config("teacher", [*overrides, *named])
    weights = folder_of(teacher).weights
    start = as_overrides({"student.initialise_from.weights": weights})
    taught = as_overrides({"teacher.weights": weights})
    students = {
        "plain student": _config("plain", overrides),
        "inherited student": _config("inherited", [*overrides, *start]),
        "D3ETR student": _config("d3etr", [*overrides, *taught]),
    }

    if shipped is None:
        on_progress("1/4  teacher: training")
        runs = [DemoRun("teacher", teacher, launch(teacher, launcher=launcher))]
    else:
        on_progress("1/4  teacher: measuring the shipped weights")
        # No cluster has to start for a few seconds of measuring.
        measure = partial(measure_shipped, weights=shipped)
        measured = launch(teacher, launcher="local", task=measure, quiet=True)
        runs = [DemoRun("teacher", teacher, measured)]
        mAP = 100 * measured.metrics.get("mAP", 0.0)
        on_progress(f"     it reaches {mAP:.1f} mAP on the validation split")
    cluster: AbstractContextManager[None] = nullcontext()
    if launcher == "ray" and folder_of(students["plain student"]).result() is None:
        from d3etr.launch.ray_cluster import connected

        # One for all students, so that Ray starts once.
        cluster = connected(teacher.cluster, on_progress)
    with cluster:
        for number, (title, config) in enumerate(students.items(), start=2):
            on_progress(f"{number}/4  {title}")
            runs.append(DemoRun(title, config, launch(config, launcher=launcher)))
    return runs


def prepare(
    *,
    train_teacher: bool = False,
    overrides: Sequence[str] = (),
    on_progress: OnProgress | None = None,
) -> None:
    """Make what the runs need and is not there: the embedded data, pre-trained backbones.

    Args:
        train_teacher: as for ``run_demo``.
        overrides: as for ``run_demo``.
        on_progress: takes scenes and steps.

    Raises:
        UserError: something cannot be written.
    """
    for recipe in ("teacher", "plain") if train_teacher else ("plain",):
        config = _config(recipe, overrides)
        if config.data.digit_scenes is not None:
            write_digit_scenes(config.data.digit_scenes, on_progress)
        weights = config.student.backbone_weights
        if isinstance(weights, Path) and not weights.exists():
            pretrain_backbone(
                config.data,
                config.student.detector.backbone,
                weights,
                config.student.pretraining,
                seed=config.run.seed,
                on_progress=on_progress or no_progress,
            )


def _shipped_weights() -> Path:
    weights = recipes_folder().parent / TEACHER_WEIGHTS
    if not weights.is_file():
        raise UserError(
            f"{weights} is missing: train the teacher with 'd3etr demo --teacher train' "
            "('make demo TEACHER=train')"
        )
    return weights


def _config(recipe: str, overrides: Sequence[str]) -> Config:
    return load_config(recipes_folder() / "digits" / f"{recipe}.yaml", overrides)
