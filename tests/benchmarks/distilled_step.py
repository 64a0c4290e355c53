"""A D3ETR step beside what it cannot do without: a plain step and the teacher's forward pass."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.problems import Replayed, Step, autocast, random_batch, random_detector
from benchmarks.side_by_side import Action, Comparison, Scale, alternate, memory_growth, scaled
from d3etr.detectors.base import DetectionTransformer

PLAIN, TEACHER, BOTH, D3ETR = "plain step", "teacher's forward", "both added", "D3ETR step"
ROUNDED = "D3ETR step, teacher.precision bfloat16"


def compare(scale: Scale) -> list[Comparison]:
    """Milliseconds of each; on a GPU also of recorded steps, and the memory of all."""
    return [table for side in scale.sides for table in _compare(side)]


def _compare(scale: Scale) -> list[Comparison]:
    batch = random_batch(scale)
    teacher = random_detector(scale, scale.teacher_backbone, 1).eval().requires_grad_(False)

    @torch.no_grad()
    def teach() -> None:
        with autocast(scale):
            teacher.decode(teacher.encode(batch[0]), [teacher.object_queries()])

    def step(teaching: DetectionTransformer | None, **changes: Any) -> Step:
        return Step(random_detector(scale, scale.backbone, 0), teaching, scale, batch, **changes)

    actions: dict[str, Action] = {PLAIN: step(None), TEACHER: teach, D3ETR: step(teacher)}
    if scale.precision == torch.float32:
        actions[ROUNDED] = step(teacher, teacher_precision=torch.bfloat16)
    found = [_parts_and_whole(scale, "", actions)]
    if scale.device.type == "cuda":
        plain, distilled = step(None, graphs=True), step(teacher, graphs=True)
        replayed: dict[str, Action] = {PLAIN: plain, TEACHER: Replayed(teach), D3ETR: distilled}
        found.append(_parts_and_whole(scale, ", all recorded (cuda_graphs)", replayed))
        memory = {
            name: [memory_growth(actions[name], scale.device) / 2**20] for name in (PLAIN, D3ETR)
        }
        title = f"{_title(scale)}: memory of a step"
        found.append(Comparison(title, "MiB at the peak", memory, PLAIN))
    return found


def _parts_and_whole(scale: Scale, how: str, actions: dict[str, Action]) -> Comparison:
    taken = scaled(alternate(actions, scale.rounds, scale.device), 1000)
    sums = [a + b for a, b in zip(taken[PLAIN], taken[TEACHER], strict=True)]
    values = {PLAIN: taken.pop(PLAIN), TEACHER: taken.pop(TEACHER), BOTH: sums, **taken}
    aim = "D3ETR step at most 1.15"
    return Comparison(f"{_title(scale)}{how}", "ms per step", values, BOTH, aim)


def _title(scale: Scale) -> str:
    return (
        f"Conditional DETR {scale.teacher_backbone} to {scale.backbone}, {scale.image} px, "
        f"{scale.batch} images, {scale.queries} queries"
    )
