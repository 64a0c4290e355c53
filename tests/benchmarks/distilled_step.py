"""A D3ETR step beside what it cannot do without: a plain step and the teacher's forward pass."""

from __future__ import annotations

import torch

from benchmarks.problems import Step, autocast, random_batch, random_detector
from benchmarks.side_by_side import Action, Comparison, Scale, alternate, memory_growth, scaled

PLAIN, TEACHER, BOTH, D3ETR = "plain step", "teacher's forward", "both added", "D3ETR step"
ROUNDED = "D3ETR step, teacher.precision bfloat16"


def compare(scale: Scale) -> list[Comparison]:
    """Milliseconds of each, and on a GPU the memory of both steps."""
    batch = random_batch(scale)
    teacher = random_detector(scale, scale.teacher_backbone, 1).eval().requires_grad_(False)
    plain = Step(random_detector(scale, scale.backbone, 0), None, scale, batch)
    distilled = Step(random_detector(scale, scale.backbone, 0), teacher, scale, batch)

    @torch.no_grad()
    def teach() -> None:
        with autocast(scale):
            teacher.decode(teacher.encode(batch[0]), [teacher.object_queries()])

    actions: dict[str, Action] = {PLAIN: plain, TEACHER: teach, D3ETR: distilled}
    if scale.precision == torch.float32:
        student = random_detector(scale, scale.backbone, 0)
        actions[ROUNDED] = Step(student, teacher, scale, batch, teacher_precision=torch.bfloat16)
    taken = scaled(alternate(actions, scale.rounds, scale.device), 1000)
    sums = [a + b for a, b in zip(taken[PLAIN], taken[TEACHER], strict=True)]
    values = {PLAIN: taken.pop(PLAIN), TEACHER: taken.pop(TEACHER), BOTH: sums, **taken}
    title = (
        f"Conditional DETR {scale.teacher_backbone} to {scale.backbone}, {scale.image} px, "
        f"{scale.batch} images, {scale.queries} queries"
    )
    found = [Comparison(title, "ms per step", values, BOTH, "D3ETR step at most 1.15")]
    if scale.device.type == "cuda":
        memory = {
            name: [memory_growth(step, scale.device) / 2**20]
            for name, step in ((PLAIN, plain), (D3ETR, distilled))
        }
        found.append(Comparison(f"{title}: memory of a step", "MiB at the peak", memory, PLAIN))
    return found
