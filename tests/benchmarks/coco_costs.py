"""What the COCO recipes cost: memory and operations counted, hours estimated from them.

``PYTHONPATH=platform:tests python tests/benchmarks/coco_costs.py docs/results`` writes
``coco_costs.json`` and ``coco_costs.md`` there. No GPU is needed, and none is measured.

Counted: one training step of one image (teacher, student, losses, backward), as PyTorch dispatches
it on the CPU, with tensors that have shapes and no content; with real ones where queries are
selected in the image.
Memory is what autograd keeps for the backward pass plus weights, gradients and AdamW's moments:
what the allocator, cuDNN and gradients of activations need comes on top.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from coco_recipes import RECIPES, TRAIN_IMAGES, recipes, teacher_detector
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.saved import Saved
from d3etr.config.data import DataConfig
from d3etr.config.load import load_config
from d3etr.config.tree import Config
from d3etr.data.augmentation import draw_augmentation, sample_generator
from d3etr.data.sampling import epoch_batches
from d3etr.detectors.build import build_detector
from d3etr.distiller import Distiller
from d3etr.matching import assignment as assignment_module
from d3etr.matching.assignment import Assignment, CostBlock, Solving, assign
from d3etr.methods.d3etr import D3ETRConfig
from d3etr.structures import ImageBatch, Targets

USUAL_SIZES = ((640, 480), (640, 427), (480, 640), (500, 375), (427, 640))
"""Widths and heights of COCO's most frequent images."""
OBJECTS = 7
"""Of an image, about COCO's mean."""
UTILISATION = 1 / 6
"""Of the peak rate. Assumed: with it the formula gives the 30 hours on 8 V100 that the authors of
Conditional DETR took for R50 and 50 epochs."""
OPERATION_SECONDS = 20e-6
"""What Python and autograd need to start one operation on a GPU. Assumed."""
TERA = 1e12
PEAKS = {
    "V100, float32": (15.7, 15.7),
    "A100, float32": (156.0, 19.5),
    "A100, bfloat16": (312.0, 312.0),
    "H100, float32": (495.0, 67.0),
    "H100, bfloat16": (989.0, 989.0),
}
"""Dense TFLOP/s of convolutions (float32: TF32, torch's default) and of the rest, from NVIDIA's
data sheets (SXM)."""


ATTENTION = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Step:
    """One training step of one image.

    Attributes:
        saved_bytes: kept for backward, without parameters.
        convolution_flops: multiplications and additions of convolutions.
        other_flops: of matrix products.
        operations: that compute something; views do not.
    """

    saved_bytes: int
    convolution_flops: int
    other_flops: int
    operations: int


class Operations(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


class InOrder(Solving):
    """Pairs without solving anything: tensors that are not there have no values."""

    def __init__(self, blocks: Sequence[CostBlock], pool: object = None) -> None:
        self._blocks, self._open = blocks, deque()

    def result(self) -> list[Assignment]:
        found = []
        for block in self._blocks:
            layers, batch, queries, columns = block.costs.shape
            index = torch.arange(min(queries, columns)).expand(layers, batch, -1)
            used = torch.ones(index.shape[1:], dtype=torch.bool)
            found.append(Assignment(index, index, (index.shape[-1],) * batch, used))
        return found


def fused(*parts: Tensor, dropout_p: float = 0.0, **options: Any) -> Tensor:
    """Attention as GPUs compute it: dropout needs no map that is kept, unlike on the CPU."""
    return ATTENTION(*parts, **options)


def build(config: Config) -> Distiller:
    """Student and teacher of a recipe."""
    student = build_detector(config.student.detector, 80).train()
    teacher = None
    if config.teacher is not None:
        teacher = build_detector(teacher_detector(config), 80)
    criterion = config.optimisation.set_criterion
    return Distiller(student, teacher, config.distillation, criterion, seed=0)


def measure(distiller: Distiller, size: tuple[int, int]) -> Step:
    """One step of one image of ``size`` (height, width), counted."""
    images = ImageBatch(torch.zeros(1, 3, *size))
    labels = torch.zeros(1, OBJECTS, dtype=torch.int64)
    targets = Targets(
        labels, torch.full((1, OBJECTS, 4), 0.5), (OBJECTS,), (1,), (size,), torch.tensor([OBJECTS])
    )
    saved, operations = Saved(distiller), Operations()
    with FlopCounterMode(display=False) as flops, operations:
        taught = distiller.run_teacher(images, targets=targets)
        normalisers = distiller.normalisers(targets, taught)
        with saved.hooks():
            losses = distiller(images, targets, taught, normalisers)
        torch.stack([*losses.values()]).sum().backward()
    distiller.zero_grad()
    counts = flops.get_flop_counts()["Global"]
    convolutions = sum(n for name, n in counts.items() if "convolution" in str(name))
    total = flops.get_total_flops()
    return Step(saved.bytes, convolutions, total - convolutions, operations.count)


def matching_seconds(config: Config) -> float:
    """Processor time of an image's bipartite problems with random costs, best of five."""
    detector, random = config.student.detector, torch.Generator().manual_seed(0)
    columns, method = [OBJECTS], config.distillation
    if isinstance(method, D3ETRConfig):
        columns += [OBJECTS] * method.has_auxiliary_group
        columns += [detector.queries] * method.matches_adaptively
    blocks = [
        CostBlock(
            str(n), torch.rand(detector.decoder_layers, 1, detector.queries, n, generator=random)
        )
        for n in columns
    ]
    taken = []
    for _ in range(5):
        begun = time.thread_time()
        assign(blocks)
        taken.append(time.thread_time() - begun)
    return min(taken)


def state_bytes(distiller: Distiller) -> int:
    """Weights of student and teacher, gradients, and AdamW's two moments."""
    whole = sum(p.numel() for p in distiller.parameters())
    trained = sum(p.numel() for p in distiller.parameters() if p.requires_grad)
    teacher = distiller.teacher
    frozen = 0
    if isinstance(teacher, torch.nn.Module):
        frozen = sum(p.numel() for p in teacher.parameters())
    return 4 * (whole + frozen + 3 * trained)


def largest_size(data: DataConfig) -> tuple[int, int]:
    """(height, width) of the largest lying image of training."""
    sides = data.augmentation.shortest_sides or ()
    if data.preprocessing.exact_size is not None:
        rows, columns = data.preprocessing.exact_size
        return max(sides, default=rows), max(sides, default=columns)
    assert data.preprocessing.longest_side is not None
    return max(sides), data.preprocessing.longest_side


def mean_size(data: DataConfig, batch_size: int, images: int = 8_000) -> tuple[int, int]:
    """A (height, width) with as many pixels as a padded image of training has on average."""
    sizes = []
    for index in range(images):
        width, height = USUAL_SIZES[index % len(USUAL_SIZES)]
        generator = sample_generator(0, 0, index)
        sizes.append(
            draw_augmentation(width, height, data.augmentation, data.preprocessing, generator).size
        )
    table = np.array(sizes, dtype=np.int64)
    batches = epoch_batches(table, batch_size, 0, 0, data.bucket_by_aspect)
    pixels = float(table[batches].max(1).prod(1).mean())
    height = round((pixels * 3 / 4) ** 0.5)
    return height, round(pixels / height)


def hours(
    step: Step, matching: float, config: Config, epochs: int, peaks: tuple[float, float]
) -> float:
    """Estimated time of a run on 8 GPUs.

    Steps x (the longer of micro-batches x operations x 20 microseconds, and
    images of a GPU x (convolutions / their peak + rest / its peak) / utilisation,
    + images of a GPU x time of matching, which nothing else runs beside).
    """
    optimisation = config.optimisation
    images = optimisation.batch_size // config.cluster.workers
    convolutions, rest = (UTILISATION * TERA * peak for peak in peaks)
    compute = images * (step.convolution_flops / convolutions + step.other_flops / rest)
    launching = step.operations * OPERATION_SECONDS * optimisation.accumulation
    steps = epochs * (TRAIN_IMAGES // optimisation.batch_size)
    return steps * (max(compute, launching) + images * matching) / 3600


def costs(name: str) -> dict[str, Any]:
    """Everything about one recipe."""
    config = load_config(RECIPES / name)
    size = mean_size(config.data, config.optimisation.batch_size)
    functional = torch.nn.functional
    selects = config.student.detector.queries_need_images
    with (
        nullcontext() if selects else FakeTensorMode(),
        patch.object(assignment_module, "HostSolving", InOrder),
        patch.object(functional, "scaled_dot_product_attention", fused),
    ):
        distiller = build(config)
        largest, usual = measure(distiller, largest_size(config.data)), measure(distiller, size)
    matching = matching_seconds(config)
    per_gpu = config.micro_batches(config.cluster.workers)
    images = config.optimisation.batch_size // per_gpu
    fixed = state_bytes(distiller)
    return {
        "recipe": name,
        "images_at_once": images,
        "state_bytes": fixed,
        "saved_bytes_per_image": largest.saved_bytes,
        "bytes_per_gpu": fixed + images * largest.saved_bytes,
        "mean_size": size,
        "mean_step": asdict(usual),
        "matching_seconds_per_image": matching,
        "hours": {
            gpu: {str(epochs): hours(usual, matching, config, epochs, peaks) for epochs in (12, 50)}
            for gpu, peaks in PEAKS.items()
        },
    }


def as_table(results: list[dict[str, Any]]) -> str:
    """Markdown; hours are of 12 epochs."""
    head = ["recipe", "states, GB", "kept for an image, GB", "images at once", "sum, GB"]
    head += ["TFLOP an image", "operations"]
    head += [f"12 epochs on 8 {gpu}, h: float32 / bfloat16" for gpu in ("A100", "H100")]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in results:
        step, hours = row["mean_step"], row["hours"]
        flops = (step["convolution_flops"] + step["other_flops"]) / TERA
        cells = [f"`coco/{row['recipe']}`", _giga(row["state_bytes"])]
        cells += [_giga(row["saved_bytes_per_image"]), str(row["images_at_once"])]
        cells += [_giga(row["bytes_per_gpu"]), f"{flops:.2f}", f"{step['operations']:,}"]
        for gpu in ("A100", "H100"):
            kinds = (hours[f"{gpu}, {kind}"]["12"] for kind in ("float32", "bfloat16"))
            cells.append(" / ".join(f"{estimate:.1f}" for estimate in kinds))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _giga(count: int) -> str:
    return f"{count / 1e9:.1f}"


def main(folder: Path) -> None:
    """Count every recipe and write both files."""
    results = []
    for name in recipes():
        results.append(costs(name))
        print(name, json.dumps(results[-1]), flush=True)
    report = {"torch": torch.__version__, "utilisation": UTILISATION, "recipes": results}
    (folder / "coco_costs.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "coco_costs.md").write_text(as_table(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
