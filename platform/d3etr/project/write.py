"""A project's files: recipes, lists of images, and a README with the commands in order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d3etr.config.yaml_text import dump_yaml
from d3etr.errors import UserError
from d3etr.files import atomic_write, clear_disk_errors
from d3etr.progress import duration
from d3etr.project.backbones import Backbones
from d3etr.project.fit import Plan
from d3etr.project.recipes import (
    BASE,
    DISTILLED,
    INHERITED,
    PLAIN,
    ROLES,
    RT_DETR,
    TEACHER,
    TEACHER_WEIGHTS,
    project_trees,
)
from d3etr.project.splitting import SHARES as SPLIT_SHARES
from d3etr.project.survey import Survey

LISTS = "data"
"""Folder of the project that holds lists of images."""
ABOUT = {
    BASE: "What the four recipes share. README.md says what was assumed, and how to run them.",
    TEACHER: "1. The teacher: larger, trained longer; it is what students learn from.",
    PLAIN: "2. The student without a teacher.",
    INHERITED: "3. The same student, started from the teacher's parts: what costs nothing, and\n"
    "# what distilling has to beat within the same time.",
    DISTILLED: "4. The same student, started from the teacher's parts and taught by it.",
}
_README = """# {name}: a d3etr project

Written by `{command}` for {data} ({format}) on {machine}.

## Commands

In this folder, one after the other. Times are estimates from steps measured on this machine.

```sh
{commands}
```

| recipe | steps | about | a step | an evaluation |
| --- | ---: | ---: | ---: | ---: |
{table}

Students have the same *time*: a distilled step costs more, so there are fewer of them. `compare`
says whether distilling was worth it here; often it is not, and then the inherited student is the
one to use. Running a command again goes on with an interrupted run. Every number in the recipes can
be changed there, or with `--set`: `d3etr explain KEY` says what a key does.

## What was found

{found}

## What was assumed

{assumed}
{doubts}"""


@dataclass(frozen=True)
class Project:
    """A project before it is written.

    Attributes:
        folder: to be made.
        data: what the person named.
        command: as typed.
        machine: in words.
        survey: of the data.
        plan: what fits.
    """

    folder: Path
    data: Path
    command: str
    machine: str
    survey: Survey
    plan: Plan


def require_new(folder: Path) -> None:
    """Refuse to write over anything.

    Raises:
        UserError: something is there.
    """
    if folder.exists() or folder.is_symlink():
        raise UserError(
            f"{folder} is there already, and nothing is written over: name another folder with "
            "--output, or move it away"
        )


def write_project(project: Project) -> None:
    """Write all files, or none.

    Raises:
        UserError: the folder is there, or cannot be written.
    """
    require_new(project.folder)
    with clear_disk_errors("the project", project.folder.parent):
        project.folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(project.folder) as temporary:
            temporary.mkdir()
            write_lists(project.survey, temporary / LISTS)
            for name, text in recipe_texts(project).items():
                (temporary / f"{name}.yaml").write_text(text, encoding="utf-8")
            (temporary / "README.md").write_text(readme(project), encoding="utf-8")


def write_lists(found: Survey, folder: Path) -> None:
    """Write the COCO files of splits that were made here; none where the data has splits."""
    for name, tree in found.made.items():
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")


def recipe_texts(project: Project) -> dict[str, str]:
    """Recipe name -> YAML with a comment on top."""
    plan = project.plan
    trees = project_trees(
        plan.design,
        project.survey.data_tree(project.folder.absolute() / LISTS),
        plan.steps,
        {role: costs.step for role, costs in plan.costs.items()},
        {role: plan.seconds(role) / 60 for role in ROLES},
    )
    return {name: f"# {ABOUT[name]}\n{dump_yaml(tree)}" for name, tree in trees.items()}


def commands(project: Project) -> list[str]:
    """What to type, in order, in the project's folder."""
    plan = project.plan
    times = {role: duration(plan.seconds(role)) for role in ROLES}
    newest = "$(ls -t runs/{}-*/weights.safetensors | head -n 1)"
    lines = ["d3etr check-data plain.yaml"]
    if plan.design.start is RT_DETR:
        lines += [
            "# Import COCO's RT-DETR once, from Hugging Face folders (PekingU/rtdetr_r50vd and",
            "# rtdetr_r18vd) or official .pth files that you have downloaded:",
            f"d3etr import-weights rtdetr_r50vd {RT_DETR.teacher}",
            f"d3etr import-weights rtdetr_r18vd {RT_DETR.student}",
        ]
    lines += [
        f"d3etr train teacher.yaml      # about {times[TEACHER]}",
        f'd3etr export "{newest.format(TEACHER)}" {TEACHER_WEIGHTS}',
        f"d3etr train plain.yaml        # about {times[PLAIN]}",
        f"d3etr train inherited.yaml    # about {times[INHERITED]}",
        f"d3etr train distilled.yaml    # about {times[DISTILLED]}",
        "d3etr compare plain inherited distilled",
        f'd3etr predict "{newest.format(DISTILLED)}" PHOTO.jpg --output predictions',
    ]
    return lines


def readme(project: Project) -> str:
    """The README of a project."""
    plan = project.plan
    rows = [
        f"| {role} | {plan.steps[role]:,} | {duration(plan.seconds(role))} | "
        f"{1000 * plan.costs[role].step:.0f} ms | {plan.costs[role].evaluation:.1f} s |"
        for role in ROLES
    ]
    total = sum(plan.seconds(role) for role in ROLES)
    rows.append(f"| all | | {duration(total)} of {duration(60 * plan.minutes)} asked | | |")
    doubts = f"\n## Doubts\n\n{_list(plan.doubts)}\n" if plan.doubts else ""
    return _README.format(
        name=project.folder.name,
        command=project.command,
        data=project.data,
        format=project.survey.format,
        machine=project.machine,
        commands="\n".join(commands(project)),
        table="\n".join(rows),
        found=_list(found_texts(project.survey)),
        assumed=_list(assumptions(project)),
        doubts=doubts,
    )


def found_texts(found: Survey) -> list[str]:
    """What a data set is like, a sentence each."""
    numbers = found.statistics
    images = ", ".join(f"{len(split.records):,} {name}" for name, split in found.splits.items())
    classes = sorted(numbers.classes.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {count:,}" for name, count in classes[:8])
    more = f" and {len(classes) - 8} more" if len(classes) > 8 else ""
    never = [name for name, count in classes if not count]
    texts = [
        f"images: {images}, typically {numbers.width} x {numbers.height} pixels",
        f"{numbers.objects:,} objects in the training images, up to {numbers.most_objects} in one; "
        f"by class: {shown}{more}",
        f"a typical object has {100 * numbers.relative_size:.1f} % of its image's side; small "
        f"ones (a tenth of all, or half of one class) less than {numbers.smallest:.0f} pixels",
    ]
    if never:
        texts.append(f"never in the training images, so never learnt: {', '.join(never[:8])}")
    return texts + list(found.warnings)


def assumptions(project: Project) -> list[str]:
    """What was chosen, and why, a sentence each."""
    plan, found = project.plan, project.survey
    sizes, numbers = plan.design.sizes, found.statistics
    texts = [
        f"images of {sizes.side} pixels (the longer side) for students: {plan.rung.reason}",
    ]
    if plan.design.start is None:
        texts += [
            _from_where(plan.design.backbones),
            f"{sizes.queries} queries: three for each object of the fullest image",
            f"boxes begin at the size of a typical object (box_size_bias {sizes.size_bias:g})",
            f"the teacher {_larger(plan.design.backbones)}sees images {sizes.scale:g} times as "
            "large; it has two and a half times a student's time, so that it leads",
            "the distilled student's learning rate is twice the plain one's, which it bears",
        ]
    else:
        texts.append(
            f"teacher and students are fine-tuned from {plan.design.start.teacher} and "
            f"{plan.design.start.student}; images are stretched to squares"
        )
    texts += _of_data(found)
    if "test" not in found.splits:
        texts.append(
            "no test split: weights are chosen on validation and measured there, a little too well"
        )
    if numbers.objects:
        texts.append(
            "images may be mirrored left to right: set data.augmentation.horizontal_flip to 0 in "
            "base.yaml where that changes a class, as it does for letters"
        )
    return texts


def _from_where(backbones: Backbones | None) -> str:
    if backbones is None:
        return (
            "no pre-trained weights: all detectors are Deformable DETRs of two levels over a small "
            "backbone that learn from nothing; name ImageNet weights of a backbone with "
            "--backbone-weights ('d3etr weights get'), or detectors of COCO with --teacher-weights "
            "and --student-weights"
        )
    ours, theirs = backbones.student, backbones.teacher
    taken = "; inherited and distilled take over the teacher's backbone" if backbones.same else ""
    return (
        f"all detectors are Deformable DETRs over backbones with ImageNet weights: students have "
        f"{ours.name} ({ours.weights}), the teacher {theirs.name} ({theirs.weights}){taken}; the "
        "rest learns from nothing, and backbones learn at a tenth of its rate"
    )


def _larger(backbones: Backbones | None) -> str:
    if backbones is None:
        return "has twice the channels in its backbone and "
    return "" if backbones.same else f"has {backbones.teacher.name} and "


def _of_data(found: Survey) -> list[str]:
    """Which splits are the data set's own, and which were made."""
    *first, last = [name for name in found.splits if name not in found.made] or [""]
    own = f"{', '.join(first)} and {last} are those of" if first else f"{last} is that of"
    texts = [f"{own} the data set"] if last else []
    if not found.made:
        return texts
    whole = sum(SPLIT_SHARES[name] for name in found.made)
    shares = " / ".join(f"{100 * SPLIT_SHARES[name] / whole:.0f} %" for name in found.made)
    divided = "the data set has no splits: images were"
    if found.part is not None:
        divided = f"the data set has no validation of its own: images of '{found.part}' were"
    return [
        *texts,
        f"{divided} divided at random ({shares} {', '.join(found.made)}) into lists in {LISTS}/; "
        "where images of one scene or video are alike, divide them by scene yourself, or "
        "validation will promise too much",
    ]


def _list(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)
