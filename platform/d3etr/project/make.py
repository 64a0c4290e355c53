"""``d3etr init`` without its arguments: look at data and machine, measure, and plan."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from d3etr.config.location import Location
from d3etr.detectors.weights import WeightsInfo, read_info
from d3etr.errors import UserError
from d3etr.progress import OnProgress
from d3etr.project.backbones import Backbones, read_backbones
from d3etr.project.fit import Plan, fit
from d3etr.project.inheriting import require_inheritable
from d3etr.project.measure import Measure, measure
from d3etr.project.recipes import RT_DETR, RUNS, Design, Start, start_from
from d3etr.project.sizes import Rung, Sizes, exact_rungs, rungs, sizes_for
from d3etr.project.survey import Statistics, Survey, survey
from d3etr.project.write import Project, require_new, write_lists, write_project
from d3etr.storage.fetch import local_file

_MOST_WORKERS = 4


@dataclass(frozen=True)
class Request:
    """What a person asks for.

    Attributes:
        data: the data set.
        minutes: for teacher and students together.
        output: the project's folder.
        command: as typed.
        images: of COCO files or Pascal VOC.
        teacher_weights: weights to fine-tune the teacher from; both or none.
        student_weights: weights to fine-tune students from.
        backbone_weights: ImageNet weights of the backbone that detectors start from.
        teacher_backbone_weights: the teacher's, where it has another backbone.
        follow_links: whether links may lead out of the folder of images.
    """

    data: Path
    minutes: float
    output: Path
    command: str
    images: Path | None = None
    teacher_weights: Location | None = None
    student_weights: Location | None = None
    backbone_weights: Location | None = None
    teacher_backbone_weights: Location | None = None
    follow_links: bool = False


@dataclass(frozen=True)
class Machine:
    """Where training will run.

    Attributes:
        gpu: its name; None without one.
        cores: CPU cores.
    """

    gpu: str | None
    cores: int

    def __str__(self) -> str:
        cores = f"{self.cores} CPU core{'s' * (self.cores != 1)}"
        return cores if self.gpu is None else f"{self.gpu} and {cores}"

    @property
    def loading_processes(self) -> int:
        """Processes that load images: one core is left to training."""
        return min(_MOST_WORKERS, max(1, self.cores - 1))


def this_machine() -> Machine:
    """This one."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(gpu, cores or 1)


def make_project(
    request: Request,
    on_progress: OnProgress,
    *,
    machine: Machine | None = None,
    measure: Measure = measure,
) -> Project:
    """Look at data and machine, measure steps, and write a project.

    Args:
        request: what is asked for.
        on_progress: called with what is found and measured.
        machine: by default this one.
        measure: makes steps.

    Raises:
        UserError: data cannot be used, weights do not fit each other, the time is too short, or
            the folder is there already.
    """
    require_new(request.output)
    machine = machine or this_machine()
    backbones = _backbones(request)
    start = None if backbones is not None else _start(request, machine)
    found = survey(request.data, request.images, on_progress, follow_links=request.follow_links)
    design = _designs(found, start, backbones, machine)
    with tempfile.TemporaryDirectory() as folder:
        write_lists(found, Path(folder))
        data = found.data_tree(Path(folder))
        runs = request.output / RUNS
        plan: Plan = fit(found, request.minutes, design, data, measure, runs, on_progress)
    project = Project(request.output, request.data, request.command, str(machine), found, plan)
    write_project(project)
    return project


def _backbones(request: Request) -> Backbones | None:
    """The backbones that the person names.

    Raises:
        UserError: they would have no effect, or are none.
    """
    if request.backbone_weights is None:
        if request.teacher_backbone_weights is not None:
            raise UserError(
                "--teacher-backbone-weights needs --backbone-weights, the students': give both, or "
                "--backbone-weights alone for all"
            )
        return None
    if (request.teacher_weights, request.student_weights) != (None, None):
        raise UserError(
            "--backbone-weights has no effect beside --teacher-weights and --student-weights, "
            "whose files have backbones of their own: leave it out"
        )
    return read_backbones(request.backbone_weights, request.teacher_backbone_weights)


def _start(request: Request, machine: Machine) -> Start | None:
    """The weights to fine-tune from: the person's, on a GPU RT-DETR's, else none.

    Raises:
        UserError: one file is named alone, or see ``require_inheritable``.
    """
    files = request.teacher_weights, request.student_weights
    if files == (None, None):
        return None if machine.gpu is None else RT_DETR
    teacher, student = files
    if teacher is None or student is None:
        raise UserError(
            "--teacher-weights and --student-weights go together: expected the files of a larger "
            "and a smaller detector, such as RT-DETR-R50 and -R18, as 'd3etr import-weights' "
            "writes them"
        )
    infos = _read(teacher), _read(student)
    start = start_from(_absolute(teacher), _absolute(student), infos)
    require_inheritable(start, infos)
    return start


def _absolute(place: Location) -> Location:
    return place.absolute() if isinstance(place, Path) else place


def _read(place: Location) -> WeightsInfo:
    with local_file(place) as file:
        return read_info(file)


def _designs(
    found: Survey, start: Start | None, backbones: Backbones | None, machine: Machine
) -> dict[Rung, Design]:
    """Sizes to try, the largest first, and what they make."""
    statistics = found.statistics
    ways: dict[Rung, Sizes] = {
        rung: (_square if start else sizes_for)(statistics, rung)
        for rung in (exact_rungs if start else rungs)(statistics)
    }
    test = "test" in found.splits and len(found.splits["test"].objects.labels) > 0
    return {
        rung: Design(sizes, start, machine.loading_processes, test, backbones=backbones)
        for rung, sizes in ways.items()
    }


def _square(found: Statistics, rung: Rung) -> Sizes:
    """Sizes of what is fine-tuned: its queries are its weights' own."""
    return Sizes(rung.side, (1.0, 1.0), 1.0, min(rung.batch, found.images), 0, 0.0)
