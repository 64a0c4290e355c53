"""``torch.compile`` and CUDA graphs, and after how many steps compiling has paid for itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.problems import Replayed, Step, autocast, random_batch, random_detector
from benchmarks.side_by_side import Action, Comparison, Scale, alternate, scaled
from d3etr.detectors.base import DetectionTransformer
from d3etr.engine.build import compile_detector

EAGER, COMPILED = "eager", "compiled"
RECORDED, BOTH = "cuda_graphs", "compiled, cuda_graphs"

MakeAction = Callable[[DetectionTransformer, bool], Action]
"""Takes a detector and whether its work is recorded."""


def compare(scale: Scale) -> list[Comparison]:
    """A plain step and the teacher's forward pass, eager, recorded and compiled."""
    if scale.device.type == "cpu":  # compiling for it takes minutes
        scale = replace(scale, image=min(scale.image, 256), backbone="resnet18")
        scale = replace(scale, teacher_backbone="resnet18")
    images, targets = random_batch(scale)

    def plain_step(student: DetectionTransformer, recorded: bool) -> Action:
        return Step(student, None, scale, (images, targets), graphs=recorded)

    def teacher_forward(teacher: DetectionTransformer, recorded: bool) -> Action:
        teacher.eval().requires_grad_(False)

        @torch.no_grad()
        def teach() -> None:
            with autocast(scale):
                teacher.decode(teacher.encode(images), [teacher.object_queries()], attention=True)

        return Replayed(teach) if recorded else teach

    return [
        _compare("plain step", scale.backbone, scale, plain_step),
        _compare("teacher's forward", scale.teacher_backbone, scale, teacher_forward),
    ]


def _compare(what: str, backbone: str, scale: Scale, make: MakeAction) -> Comparison:
    actions = {EAGER: make(random_detector(scale, backbone, 0), False)}
    compiled = random_detector(scale, backbone, 0)
    compile_detector(compiled)
    recorded = scale.device.type == "cuda"
    if recorded:
        actions[RECORDED] = make(random_detector(scale, backbone, 0), True)
    notes: tuple[str, ...] = ()
    warm_up = 0.0
    if not scale.smoke:
        actions[COMPILED] = make(compiled, False)
        begun = time.perf_counter()
        actions[COMPILED]()
        warm_up = time.perf_counter() - begun
        if recorded:
            actions[BOTH] = make(compiled, True)
    taken = scaled(alternate(actions, scale.rounds, scale.device), 1000)
    if warm_up:
        pairs = [(EAGER, COMPILED), *([(RECORDED, BOTH)] if recorded else [])]
        notes = tuple(_break_even(*pair, warm_up, taken) for pair in pairs)
    title = f"{what} of Conditional DETR {backbone}, {scale.image} px, {scale.batch} images"
    return Comparison(title, "ms", taken, EAGER, notes=notes)


def _break_even(base: str, name: str, warm_up: float, taken: dict[str, list[float]]) -> str:
    before, after = (statistics.median(taken[key]) for key in (base, name))
    begin = f"{name}: compiling one shape takes {warm_up:.0f} s"
    if after >= before:
        return f"{begin} and never pays here."
    steps = 1000 * warm_up / (before - after)
    return f"{begin} and pays after {steps:,.0f} steps, beside '{base}'."
