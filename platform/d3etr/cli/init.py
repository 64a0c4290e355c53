"""``d3etr init``: a project for one's own images, sized to data, machine and minutes."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from d3etr.cli.command import (
    Command,
    above_zero,
    add_json,
    answer,
    folder_to_write,
    location,
)
from d3etr.cli.progress import print_progress
from d3etr.errors import UserError
from d3etr.progress import duration, no_progress

LONGEST_MINUTES = 1e6
_REPEATED = (
    *("output", "images", "teacher_weights", "student_weights"),
    *("backbone_weights", "teacher_backbone_weights"),
)
"""Options that the project's README repeats where they were given."""


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "data",
        type=Path,
        metavar="DATA",
        help="COCO file or folder, YOLO data.yaml or its folder, Pascal VOC folder, image folder",
    )
    parser.add_argument(
        "--minutes",
        type=above_zero,
        required=True,
        metavar="M",
        help="for teacher and three students together, on this machine",
    )
    parser.add_argument(
        "--output",
        type=folder_to_write,
        metavar="FOLDER",
        help="the project's folder, not there yet (default: DATA's name and -project)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="of the images of COCO files or Pascal VOC, where they are not found around them",
    )
    parser.add_argument(
        "--follow-links", action="store_true", help="links may lead out of the image folder"
    )
    for role, what in (("teacher", "the larger"), ("student", "the smaller")):
        parser.add_argument(
            f"--{role}-weights",
            type=location,
            metavar="FILE",
            help=f"{what} pre-trained detector (d3etr import-weights) to fine-tune; both or none",
        )
    for name, what in (("", "all detectors'"), ("teacher-", "the teacher's, where it is another:")):
        parser.add_argument(
            f"--{name}backbone-weights",
            type=location,
            metavar="FILE",
            help=f"{what} backbone with ImageNet weights (d3etr weights get, import-weights)",
        )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.project.fit import overview
    from d3etr.project.make import Request, make_project

    if options.minutes > LONGEST_MINUTES:
        raise UserError(f"--minutes {options.minutes:g}: expected at most {LONGEST_MINUTES:g}")
    output = options.output or Path(f"{options.data.absolute().stem or 'd3etr'}-project")
    request = Request(
        options.data,
        options.minutes,
        output,
        _command(options),
        options.images,
        options.teacher_weights,
        options.student_weights,
        options.backbone_weights,
        options.teacher_backbone_weights,
        options.follow_links,
    )
    project = make_project(request, no_progress if options.quiet else print_progress)
    plan = project.plan
    value: dict[str, Any] = {
        "folder": str(project.folder),
        "minutes": plan.minutes,
        "side": plan.design.sizes.side,
        "batch_size": plan.design.sizes.batch,
        "doubts": list(plan.doubts),
        "warnings": list(project.survey.warnings),
        "runs": {
            role: {"steps": steps, "seconds": plan.seconds(role)}
            for role, steps, _ in overview(plan)
        },
    }
    lines = [f"{role:<10} {steps:>8,} steps, about {time}" for role, steps, time in overview(plan)]
    total = duration(sum(plan.seconds(role) for role, *_ in overview(plan)))
    lines.append(f"in all     about {total} of the {plan.minutes:g} minutes asked for")
    lines += [f"doubt: {text}" for text in plan.doubts]
    lines.append(f"written: {project.folder}; {project.folder / 'README.md'} has the commands")
    answer(options, value, "\n".join(lines))
    return 0


def _command(options: Namespace) -> str:
    parts = ["d3etr", "init", str(options.data), "--minutes", f"{options.minutes:g}"]
    if options.follow_links:
        parts.append("--follow-links")
    for name in _REPEATED:
        if getattr(options, name) is not None:
            parts += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return shlex.join(parts)


COMMAND = Command(
    "init",
    "a project for images of your own: recipes that fit data, machine and minutes",
    _add_arguments,
    _run,
)
