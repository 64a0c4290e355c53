"""``torch.compile`` for student and teacher, and after how many steps it has paid for itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.problems import Step, autocast, random_batch, random_detector
from benchmarks.side_by_side import Action, Comparison, Scale, alternate, scaled, seconds
from d3etr.training.assembly import compile_detector

MODES = ("default",)
GPU_MODES = ("default", "reduce-overhead")
"""reduce-overhead: CUDA graphs."""


def compare(scale: Scale) -> list[Comparison]:
    """A plain step and the teacher's forward pass, eager and compiled."""
    if scale.device.type == "cpu":  # compiling for it takes minutes
        scale = replace(scale, image=min(scale.image, 256), backbone="resnet18")
        scale = replace(scale, teacher_backbone="resnet18")
    return [
        _compare("plain step", scale.backbone, scale, _plain_step),
        _compare("teacher's forward", scale.teacher_backbone, scale, _teacher_forward),
    ]


def _plain_step(scale: Scale, mode: str | None) -> Action:
    student = random_detector(scale, scale.backbone, 0)
    if mode is not None:
        compile_detector(student, mode=mode)
    return Step(student, None, scale, random_batch(scale))


def _teacher_forward(scale: Scale, mode: str | None) -> Action:
    teacher = random_detector(scale, scale.teacher_backbone, 1).eval().requires_grad_(False)
    if mode is not None:
        compile_detector(teacher, mode=mode)
    images, _ = random_batch(scale)

    @torch.no_grad()
    def teach() -> None:
        with autocast(scale):
            teacher.decode(teacher.encode(images), [teacher.object_queries()], attention=True)

    return teach


def _compare(
    what: str, backbone: str, scale: Scale, make: Callable[[Scale, str | None], Action]
) -> Comparison:
    actions, warm_up = {"eager": make(scale, None)}, {}
    seconds(actions["eager"], scale.device)
    for mode in _modes(scale):
        name = f"compiled, mode {mode}"
        actions[name] = make(scale, mode)
        begun = time.perf_counter()
        actions[name]()
        warm_up[name] = time.perf_counter() - begun
    taken = scaled(alternate(actions, scale.rounds, scale.device), 1000)
    notes = [_break_even(name, cost, taken) for name, cost in warm_up.items()]
    title = f"{what} of Conditional DETR {backbone}, {scale.image} px, {scale.batch} images"
    return Comparison(title, "ms", taken, "eager", notes=tuple(notes))


def _modes(scale: Scale) -> tuple[str, ...]:
    if scale.smoke:
        return ()
    return GPU_MODES if scale.device.type == "cuda" else MODES


def _break_even(name: str, warm_up: float, taken: dict[str, list[float]]) -> str:
    eager, compiled = (statistics.median(taken[key]) for key in ("eager", name))
    begin = f"{name}: compiling one shape takes {warm_up:.0f} s"
    if compiled >= eager:
        return f"{begin} and never pays here."
    return f"{begin} and pays after {1000 * warm_up / (eager - compiled):,.0f} steps."
