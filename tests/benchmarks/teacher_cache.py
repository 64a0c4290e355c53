"""The teacher's forward pass beside its outputs read from the cache, on digit scenes.

The recipe is trainers/recipes/digits/d3etr.yaml as it is, on every device: the cache is for images
of one size, and of pictures as large as COCO's a record is too large (see the notes).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.machine import ROOT
from benchmarks.side_by_side import Comparison, Scale, alternate, scaled
from benchmarks.step_costs import Case
from d3etr.config.load import load_config
from d3etr.distillation.teaching import Taught
from d3etr.storage.cache import FOLDER_VARIABLE
from d3etr.structures import ImageBatch, Targets
from d3etr.training.step import MicroBatch
from d3etr.training.teacher_cache import TeacherCache

RECIPE = ROOT / "trainers/recipes/digits/d3etr.yaml"
SCENES = ("train_images=64", "validation_images=8", "test_images=8")
GIGABYTES = 1.0
BATCHES = 8
"""Of each turn: one is too short to measure. All the images that there are."""
RUNS, READ = "the teacher runs", "read from the cache"
KEPT = "computed and kept (all images new)"
COLD = "read, after the system was made to write the file out and forget it"

# COCO at 800 x 1,088 pixels, stride 32; six layers, eight heads, float32.
_COCO = {"layers": 6, "heads": 8, "classes": 80, "queries": 300, "tokens": 25 * 34}


def compare(scale: Scale) -> list[Comparison]:
    """A batch's outputs by each way, and a whole D3ETR step."""
    if scale.device.type == "cpu":
        torch.set_num_threads(1)  # as the recipe says
    with tempfile.TemporaryDirectory() as folder, _cases(Path(folder)) as (plain, cached):
        batches, looks = plain.draw(2 if scale.smoke else BATCHES), _NewLooks()
        return [
            _outputs(scale, plain, cached, batches, looks),
            _steps(scale, plain, cached, batches, looks),
        ]


@contextmanager
def _cases(folder: Path) -> Iterator[tuple[Case, Case]]:
    """The recipe without and with a cache."""
    scenes = [f"data.digit_scenes.{text}" for text in SCENES]
    overrides = [*scenes, f"data.digit_scenes.root={folder}"]
    with patch.dict(os.environ, {FOLDER_VARIABLE: str(folder / "cache")}):
        plain = Case(RUNS, load_config(RECIPE, overrides))
        sized = f"teacher.cache_gigabytes={GIGABYTES}"
        cached = Case(READ, load_config(RECIPE, [*overrides, sized]))
    try:
        yield plain, cached
    finally:
        plain.close()
        cached.close()


def _outputs(
    scale: Scale,
    plain: Case,
    cached: Case,
    batches: Sequence[list[MicroBatch]],
    looks: _NewLooks,
) -> Comparison:
    cache = _cache(cached)
    hosts = [images for ((images, _),) in batches]
    placed = [images.to(scale.device) for images in hosts]

    def ask(one: Callable[[ImageBatch, ImageBatch], object], new: bool = False) -> None:
        for images, host in zip(placed, hosts, strict=True):
            one(images, looks.of(host) if new else host)

    def cold() -> None:
        _drop_from_memory(cache)
        ask(cache.teach)

    contenders = {
        RUNS: lambda: ask(lambda images, _: plain.distiller.teach(images)),
        READ: lambda: ask(cache.teach),
        COLD: cold,
        KEPT: lambda: ask(cache.teach, new=True),
    }
    taken = alternate(contenders, scale.rounds, scale.device)
    size = cache.record_bytes
    return Comparison(
        f"The teacher's outputs for {len(hosts[0].pixels)} digit scenes",
        "ms per batch",
        scaled(taken, 1000 / len(batches)),
        baseline=RUNS,
        notes=(
            f"{size / 1e3:,.0f} KB an image: a run of one epoch (6,000 images) fills "
            f"{6000 * size / 1e9:.2f} GB.",
            *_coco_notes(),
        ),
    )


def _steps(
    scale: Scale,
    plain: Case,
    cached: Case,
    batches: Sequence[list[MicroBatch]],
    looks: _NewLooks,
) -> Comparison:
    def new() -> None:
        cached.do([[(looks.of(images), targets)] for ((images, targets),) in batches])

    contenders = {
        RUNS: lambda: plain.do(batches),
        READ: lambda: cached.do(batches),
        KEPT: new,
    }
    taken = alternate(contenders, scale.rounds, scale.device)
    ((images, targets),) = batches[0]
    change = _change_by_half(cached, images.to(scale.device), targets.to(scale.device))
    return Comparison(
        f"A D3ETR step on {len(images.pixels)} digit scenes",
        "ms",
        scaled(taken, 1000 / len(batches)),
        baseline=RUNS,
        aim="reading is worth keeping if the step is shorter by clearly more than the spread",
        notes=(
            "Records are the float32 values, and losses equal to the last bit where batches are. "
            f"In half precision, records of half the size, this batch's loss would change by "
            f"{change['total']:.1e} of itself, its most changed term ({change['term']}) by "
            f"{change['worst']:.1e}.",
        ),
    )


class _NewLooks:
    """Images that no cache has seen."""

    def __init__(self) -> None:
        self._number = 0.0

    def of(self, images: ImageBatch) -> ImageBatch:
        """These images but for one value of one pixel."""
        self._number += 1e-3
        pixels = images.pixels.clone()
        pixels[:, 0, 0, 0] = self._number
        return ImageBatch(pixels)


def _cache(case: Case) -> TeacherCache:
    assert case.cache is not None
    return case.cache


def _drop_from_memory(cache: TeacherCache) -> None:
    """Make the system forget the file, so that the disk is read."""
    file = os.open(cache.path, os.O_RDWR)
    try:
        os.fdatasync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _change_by_half(case: Case, images: ImageBatch, targets: Targets) -> dict[str, str | float]:
    """Relative change of a step's losses if the teacher's outputs are rounded to float16."""
    distiller = case.distiller
    taught = distiller.teach(images)
    assert taught is not None
    exact, rounded = (_losses(case, images, targets, one) for one in (taught, _halved(taught)))
    changes = {
        name: abs(rounded[name] - exact[name]) / max(abs(exact[name]), 1e-12) for name in exact
    }
    worst = max(changes, key=lambda name: changes[name])
    sums = sum(exact.values()), sum(rounded.values())
    return {"total": abs(sums[1] - sums[0]) / sums[0], "term": worst, "worst": changes[worst]}


def _losses(
    case: Case, images: ImageBatch, targets: Targets, taught: Taught | None
) -> dict[str, float]:
    distiller = case.distiller
    if taught is not None:
        taught = distiller.recall(taught.outputs, taught.tokens)
    with torch.no_grad():
        losses = distiller(images, targets, taught, distiller.normalisers(targets, taught))
    return {name: float(loss) for name, loss in losses.items()}


def _halved(taught: Taught) -> Taught:
    outputs = {
        name: value.half().float()
        for name, value in vars(taught.outputs).items()
        if isinstance(value, torch.Tensor)
    }
    return replace(taught, outputs=replace(taught.outputs, **outputs))


def _coco_notes() -> tuple[str, ...]:
    """What a record of a COCO picture would hold; computed."""
    whole = _coco_bytes(_COCO["queries"])
    top = _coco_bytes(_COCO["queries"] // 10)
    return (
        f"Computed for COCO (800 x 1,088 pixels, {_COCO['queries']} queries, {_COCO['layers']} "
        f"layers, {_COCO['heads']} heads): {whole / 1e6:.0f} MB an image, "
        f"{16 * whole / 1e9:.1f} GB to read for a batch of 16; with the "
        f"{_COCO['queries'] // 10} most confident queries only, and so with other losses, "
        f"{top / 1e6:.1f} MB, {118_287 * top / 1e12:.1f} TB for one look at each of 118,287 "
        "images. Its images have sizes drawn at random besides, for which the cache is refused.",
    )


def _coco_bytes(queries: int) -> int:
    """Logits, boxes and both attentions' scores of one image."""
    row = _COCO["classes"] + 4 + _COCO["heads"] * (queries + _COCO["tokens"])
    return 4 * _COCO["layers"] * queries * row
