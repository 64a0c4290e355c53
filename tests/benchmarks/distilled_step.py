"""A D3ETR step beside what it cannot do without: a plain step and the teacher's forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.kinds_step import SIDE
from benchmarks.problems import Replayed, Step, autocast, random_batch, random_detector
from benchmarks.side_by_side import Action, Comparison, Scale, alternate, memory_growth, scaled
from d3etr.detectors.base import DetectionTransformer

PLAIN, TEACHER, BOTH, D3ETR = "plain step", "teacher's forward", "both added", "D3ETR step"
ROUNDED = "D3ETR step, teacher.precision bfloat16"


@dataclass(frozen=True)
class Case:
    """A teacher and a student.

    Attributes:
        title: kind and sizes.
        student: its backbone, and what else is not the default.
        teacher: the same of the teacher.
        shared: of both.
    """

    title: str
    student: Mapping[str, Any]
    teacher: Mapping[str, Any]
    shared: Mapping[str, Any]

    def build(self, scale: Scale, seed: int, of: Mapping[str, Any]) -> DetectionTransformer:
        """With random weights."""
        return random_detector(scale, seed=seed, **{**self.shared, **of})


REAL_TIME = {"dropout": 0.0, "encoder_layers": 1, "feedforward": 1024, "encoder_feedforward": 1024}
KINDS = (
    Case(
        "RT-DETR R50 to R18",
        {"backbone": "resnet18vd", "decoder_layers": 3, "expansion": 0.5},
        {"backbone": "resnet50vd", "decoder_layers": 6, "expansion": 1.0},
        {"name": "rt_detr", **REAL_TIME},
    ),
    Case(
        "D-FINE L to S",
        {"backbone": "timm/hgnetv2_b0", "decoder_layers": 3, "expansion": 0.5, "encoder_blocks": 1},
        {"backbone": "timm/hgnetv2_b4", "decoder_layers": 6, "expansion": 1.0, "encoder_blocks": 3},
        {"name": "d_fine", **REAL_TIME},
    ),
)


def compare(scale: Scale) -> list[Comparison]:
    """Milliseconds of each; on a GPU also of recorded steps, and the memory of all."""
    found = [_compare(side, conditional(side)) for side in scale.sides]
    found += [_compare(*kind, recorded=False) for kind in kinds(scale)]
    return [table for tables in found for table in tables]


def conditional(scale: Scale, **shared: Any) -> Case:
    """Conditional DETR at the scale's sizes."""
    student, teacher = {"backbone": scale.backbone}, {"backbone": scale.teacher_backbone}
    title = f"Conditional DETR {scale.teacher_backbone} to {scale.backbone}"
    return Case(title, student, teacher, shared)


def kinds(scale: Scale) -> list[tuple[Scale, Case]]:
    """``KINDS``, each with what it is measured at."""
    on_cpu = scale.device.type == "cpu" and not scale.smoke
    side = replace(scale, image=SIDE if on_cpu else scale.image, larger=None)
    cases = [replace(case, teacher=case.student) for case in KINDS] if scale.smoke else KINDS
    return [(side, case) for case in cases]


def _compare(scale: Scale, case: Case, *, recorded: bool = True) -> list[Comparison]:
    """Recorded: on a GPU, as CUDA graphs too, which kinds that select queries do not take."""
    batch = random_batch(scale)
    teacher = case.build(scale, 1, case.teacher).eval().requires_grad_(False)

    @torch.no_grad()
    def teach() -> None:
        with autocast(scale):
            memory = teacher.encode(batch[0])
            teacher.decode(memory, [teacher.object_queries(memory)])

    def step(teaching: DetectionTransformer | None, **changes: Any) -> Step:
        return Step(case.build(scale, 0, case.student), teaching, scale, batch, **changes)

    actions: dict[str, Action] = {PLAIN: step(None), TEACHER: teach, D3ETR: step(teacher)}
    if scale.precision == torch.float32:
        actions[ROUNDED] = step(teacher, teacher_precision=torch.bfloat16)
    title = titled(scale, case)
    found = [_parts_and_whole(scale, title, actions)]
    if scale.device.type == "cuda" and recorded:
        plain, distilled = step(None, graphs=True), step(teacher, graphs=True)
        replayed: dict[str, Action] = {PLAIN: plain, TEACHER: Replayed(teach), D3ETR: distilled}
        found.append(_parts_and_whole(scale, f"{title}, all recorded (cuda_graphs)", replayed))
        memory = {
            name: [memory_growth(actions[name], scale.device) / 2**20] for name in (PLAIN, D3ETR)
        }
        found.append(Comparison(f"{title}: memory of a step", "MiB at the peak", memory, PLAIN))
    return found


def _parts_and_whole(scale: Scale, title: str, actions: dict[str, Action]) -> Comparison:
    taken = scaled(alternate(actions, scale.rounds, scale.device), 1000)
    sums = [a + b for a, b in zip(taken[PLAIN], taken[TEACHER], strict=True)]
    values = {PLAIN: taken.pop(PLAIN), TEACHER: taken.pop(TEACHER), BOTH: sums, **taken}
    aim = "D3ETR step at most 1.15"
    return Comparison(title, "ms per step", values, BOTH, aim)


def titled(scale: Scale, case: Case) -> str:
    """Kind, sizes and batch."""
    return f"{case.title}, {scale.image} px, {scale.batch} images, {scale.queries} queries"
