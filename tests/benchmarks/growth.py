"""How a D3ETR step grows with the size of its problem, and with what exponent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.problems import CLASSES, OBJECTS, Step, random_batch, random_detector
from benchmarks.saved import Saved
from benchmarks.side_by_side import Comparison, Scale, seconds

MEGABYTE = 1e6


@dataclass(frozen=True)
class Axis:
    """One size that varies, everything else as usual.

    Attributes:
        name: for people.
        sizes: ascending.
        theory: what time should do, in words.
        scale: sizes to fields of the scale.
        detector: fields of both detectors that are that size.
        batch: arguments of the batch that are.
    """

    name: str
    sizes: Sequence[int]
    theory: str
    scale: tuple[str, ...] = ()
    detector: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()


AXES = (
    Axis(
        "object queries",
        (100, 300, 900),
        "1 for the decoder, 2 for self-attention maps, 3 for Adaptive Matching in the worst case",
        scale=("queries",),
    ),
    Axis("decoder layers", (1, 3, 6), "1", detector=("decoder_layers",)),
    Axis(
        "image side, pixels",
        (128, 256, 512),
        "2 for the backbone, 4 for the encoder's attention",
        scale=("image",),
    ),
    Axis("classes", (80, 365, 1203), "at most 1", batch=("classes",)),
    Axis("objects per image", (0, 7, 50, 500), "at most 1", batch=("objects",)),
)


@dataclass
class Point:
    """What was measured at one size.

    Attributes:
        milliseconds: of each round.
        kept: megabytes kept for the backward pass.
    """

    milliseconds: list[float] = field(default_factory=list)
    kept: float = 0.0


def compare(scale: Scale) -> list[Comparison]:
    """A table of times and one of memory for every axis."""
    if scale.device.type == "cpu" and not scale.smoke:
        scale = replace(scale, backbone="resnet18", teacher_backbone="resnet18", image=128)
    few = [replace(axis, sizes=[size for size in axis.sizes if size][:2]) for axis in AXES]
    axes = few if scale.smoke else AXES
    return [table for axis in axes for table in _tables(axis, scale)]


def _tables(axis: Axis, scale: Scale) -> list[Comparison]:
    points = {size: _measure(axis, size, scale) for size in axis.sizes}
    usual = f"{scale.backbone}, {scale.image} px, {scale.batch} images, {scale.queries} queries"
    times = {f"{size:,}": point.milliseconds for size, point in points.items()}
    kept = {f"{size:,}": [point.kept] for size, point in points.items()}
    medians = {size: statistics.median(point.milliseconds) for size, point in points.items()}
    note = f"Exponent of the last step: {exponent(medians):.2f}; in theory {axis.theory}."
    memory = f"Exponent of the last step: {exponent({s: p.kept for s, p in points.items()}):.2f}."
    return [
        Comparison(f"D3ETR step by {axis.name} ({usual})", "ms", times, notes=(note,)),
        Comparison(f"Kept for backward by {axis.name}", "MB", kept, notes=(memory,)),
    ]


def exponent(values: Mapping[int, float]) -> float:
    """K of values that grow as size^k, between the two largest sizes."""
    (small, below), (large, above) = sorted(values.items())[-2:]
    return math.log(above / below) / math.log(large / small)


def _measure(axis: Axis, size: int, scale: Scale) -> Point:
    scale = replace(scale, **dict.fromkeys(axis.scale, size))
    batch: dict[str, Any] = {"objects": OBJECTS, "classes": CLASSES}
    batch |= dict.fromkeys(axis.batch, size)
    detector = dict.fromkeys(axis.detector, size)
    student, teacher = (
        random_detector(scale, name, seed, batch["classes"], **detector)
        for seed, name in enumerate((scale.backbone, scale.teacher_backbone))
    )
    teacher.eval().requires_grad_(False)
    step = Step(student, teacher, scale, random_batch(scale, **batch))
    saved, point = Saved(step.distiller), Point()
    with saved.hooks():
        step()
    point.kept = saved.bytes / MEGABYTE
    for _ in range(min(3, scale.rounds)):
        point.milliseconds.append(1000 * seconds(step, scale.device))
    return point
