"""Steps recorded as CUDA graphs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_detector_config
from tiny_runs import MakeConfig, losses
from torch import Tensor

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.batch_norm import BatchNorm2d, trained_statistics
from d3etr.detectors.build import build_detector
from d3etr.distiller import Distiller
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.graphs import (
    OBJECTS,
    SIDES,
    Pass,
    StepGraphs,
    padded,
    unsupported_reason,
    whole_pass,
)
from d3etr.engine.journal import read_journal
from d3etr.engine.run import run_training
from d3etr.engine.seeding import seed_generators
from d3etr.structures import ImageBatch, Targets

CUDA = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def batch(
    height: int, width: int, objects: tuple[int, ...], seed: int = 0
) -> tuple[ImageBatch, Targets]:
    """Random images without padding; as many slots as the fullest image needs."""
    generator = torch.Generator().manual_seed(seed)
    images, most = len(objects), max(objects)
    boxes = torch.rand(images, most, 4, generator=generator) * 0.4 + 0.2
    labels = torch.randint(3, (images, most), generator=generator)
    pixels = torch.randn(images, 3, height, width, generator=generator)
    sizes = ((height, width),) * images
    ids = tuple(range(images))
    return ImageBatch(pixels), Targets(labels, boxes, objects, ids, sizes, torch.tensor(objects))


def test_what_fits_stays_as_it_is() -> None:
    images, targets = batch(SIDES, 2 * SIDES, (OBJECTS, 3))
    same, also = padded(images, targets)
    assert same is images and also is targets


def test_the_teachers_picture_is_padded_too() -> None:
    images, targets = batch(SIDES, SIDES, (OBJECTS, 3))
    theirs, _ = batch(2 * SIDES - 3, 2 * SIDES, (1, 1))
    same, _ = padded(replace(images, for_teacher=theirs), targets)
    assert same.pixels is images.pixels and same.padding is None
    larger = same.for_teacher
    assert larger is not None and larger.padding is not None
    assert larger.pixels.shape[2:] == (2 * SIDES, 2 * SIDES)
    assert larger.padding[:, -3:].all() and not larger.padding[:, :-3].any()


@pytest.mark.parametrize("objects", [(0, 0), (1, 0), (OBJECTS + 1, 2)])
def test_padding_hides_what_it_adds(objects: tuple[int, ...]) -> None:
    images, targets = batch(SIDES - 1, SIDES + 1, objects)
    larger, more = padded(images, targets)
    assert larger.pixels.shape[-2:] == (SIDES, 2 * SIDES) and larger.padding is not None
    assert larger.padding.sum() == 2 * (SIDES * 2 * SIDES - (SIDES - 1) * (SIDES + 1))
    assert not larger.padding[:, : SIDES - 1, : SIDES + 1].any()
    assert torch.equal(larger.pixels[..., : SIDES - 1, : SIDES + 1], images.pixels)
    slots = more.labels.shape[1]
    assert slots % OBJECTS == 0 and slots >= max(OBJECTS, *objects)
    assert more.boxes_cxcywh.shape[1] == slots
    assert torch.equal(more.labels[:, : max(objects)], targets.labels)
    assert torch.equal(more.num_objects, targets.num_objects)


def distilled(
    device: torch.device, method: str = "d3etr", name: str = "conditional_detr", **changes: Any
) -> Distiller:
    """A tiny pair with dropout."""
    torch.manual_seed(0)
    settings = {"name": name, "width": 32, "heads": 2, "feedforward": 32, "dropout": 0.1}
    student, teacher = (
        build_detector(tiny_detector_config(**(settings | {"queries": queries} | changes)), 3)
        for queries in (6, 8)
    )
    teacher = teacher.to(device)
    config = MethodConfig.parse({"method": method})
    known = None if method == "none" else teacher
    distiller = Distiller(student, known, config, SetCriterionConfig(), seed=0)
    return distiller.to(device).train()


def plain_pass(distiller: Distiller) -> Pass:
    """As the training step makes it without graphs."""

    def run(
        images: ImageBatch, targets: Targets, factor: Tensor, distils: bool
    ) -> dict[str, Tensor]:
        with torch.autocast(images.pixels.device.type, torch.bfloat16):
            taught = distiller.run_teacher(images, targets=targets) if distils else None
            sums = distiller.normalisers(targets, taught)
            found = distiller(images, targets, taught, sums, factor)
        torch.stack([*found.values()]).sum().backward()
        return {key: loss.detach() for key, loss in found.items()}

    return run


def test_unused_slots_change_no_loss() -> None:
    distiller = distilled(torch.device("cpu")).eval()
    run = plain_pass(distiller)
    images, targets = batch(SIDES, SIDES, (3, 1))
    _, more = padded(images, targets)
    assert more.labels.shape != targets.labels.shape
    exact, found = (run(images, part, torch.ones(()), True) for part in (targets, more))
    for name, loss in exact.items():
        torch.testing.assert_close(found[name], loss, msg=name)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"method": "kd_detr"}, "general points"),
        ({"name": "deformable_detr", "two_stage": True, "box_refinement": True}, "proposals"),
        ({"queries": 2049}, "2,049 queries"),
    ],
)
def test_what_takes_the_host_is_not_recorded(
    changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("d3etr.engine.graphs.runs_kernels", lambda _: True)
    found = unsupported_reason(distilled(torch.device("cpu"), **changes), torch.device("cpu"))
    assert (found is None) if reason is None else (found is not None and reason in found)


@pytest.mark.parametrize(
    ("optimisation", "reason"),
    [({}, "needs a GPU"), ({"accumulation": 2}, "several micro-batches")],
)
def test_a_setting_without_effect_is_named(
    make_config: MakeConfig, tmp_path: Path, optimisation: dict[str, int], reason: str
) -> None:
    config = make_config(optimisation={"cuda_graphs": True, "epochs": 1, **optimisation})
    run_training(config, tmp_path / "run", SingleProcess(torch.device("cpu")))
    texts = [r["text"] for r in read_journal(tmp_path / "run" / "journal.jsonl") if "text" in r]
    assert any("optimisation.cuda_graphs has no effect" in t and reason in t for t in texts)


def _eager(
    run: Pass,
    images: ImageBatch,
    targets: Targets,
    distiller: Distiller,
    seed: Callable[[], None],
    distils: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients by name."""
    distiller.zero_grad(set_to_none=True)
    seed()
    found = run(images, targets, torch.full((), 0.5, device=images.pixels.device), distils)
    parts = distiller.named_parameters()
    return found, {name: p.grad.clone() for name, p in parts if p.grad is not None}


@needs_gpu
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("conditional_detr", "none"),
        ("conditional_detr", "d3etr"),
        ("dab_detr", "d3etr"),
        ("detr", "detrdistill"),
        ("deformable_detr", "d3etr"),
    ],
)
def test_replayed_passes_are_those_of_the_host(name: str, method: str) -> None:
    distiller = distilled(CUDA, method, name)
    run = plain_pass(distiller)
    recorded = whole_pass(distiller, CUDA, "bfloat16", "bfloat16")
    graphs = StepGraphs(recorded, [*distiller.parameters()], CUDA)
    shapes = [(64, 128, (3, 16)), (128, 64, (2, 1)), (64, 128, (0, 5)), (128, 64, (0, 0))]
    for number, (height, width, objects) in enumerate([*shapes, *shapes]):
        distils = number % 4 != 1
        images, targets = padded(*batch(height, width, objects, number))
        images, targets = images.to(CUDA), targets.to(CUDA)
        seed = partial(seed_generators, number, CUDA)
        exact, first = _eager(run, images, targets, distiller, seed, distils)
        _, second = _eager(run, images, targets, distiller, seed, distils)
        found = graphs(images, targets, 0.5, seed, distils=distils)
        assert found.keys() == exact.keys()
        for key, loss in exact.items():
            torch.testing.assert_close(found[key], loss, rtol=1e-3, atol=1e-5, msg=key)
        least = 1e-3 * max(float(gradient.norm()) for gradient in first.values())
        for name, parameter in distiller.named_parameters():
            if name not in first:
                assert parameter.grad is None
                continue
            assert parameter.grad is not None
            noise = (second[name] - first[name]).norm()  # sums in any order
            error = (parameter.grad - first[name]).norm()
            assert error <= 0.02 * first[name].norm() + 5 * noise + least, name
    assert len(graphs._graphs) == 3  # one shape has plain steps too


@needs_gpu
def test_a_recorded_batch_counts_once_in_running_statistics() -> None:
    """Recording runs the first batch of a shape some times more."""
    norm, expected = BatchNorm2d(3).to(CUDA), BatchNorm2d(3).to(CUDA)

    def run(
        images: ImageBatch, targets: Targets, factor: Tensor, distils: bool
    ) -> dict[str, Tensor]:
        loss = norm(images.pixels).pow(3).sum() * factor
        loss.backward()
        return {"loss": loss.detach()}

    statistics = [*trained_statistics(norm).values()]
    graphs = StepGraphs(run, [*norm.parameters()], CUDA, statistics)
    for number in range(2):
        images, targets = batch(SIDES, SIDES, (OBJECTS, 3), number)
        images, targets = images.to(CUDA), targets.to(CUDA)
        graphs(images, targets, 1.0, lambda: None, distils=False)
        expected(images.pixels)
    torch.testing.assert_close(norm.running_mean, expected.running_mean)
    torch.testing.assert_close(norm.running_var, expected.running_var)


@needs_gpu
def test_a_run_with_graphs_learns(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(optimisation={"cuda_graphs": True, "precision": "bfloat16"})
    run_training(config, tmp_path / "run", SingleProcess(CUDA))
    journal = read_journal(tmp_path / "run" / "journal.jsonl")
    assert not [record for record in journal if "cuda_graphs" in str(record)]
    found = losses(tmp_path / "run")
    assert sum(found[-3:]) < sum(found[:3])
