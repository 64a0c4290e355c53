"""Training with what a detector brings: denoising queries, a class loss, telling proposals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILY, tiny_detector_config
from torch import Tensor, nn
from torch.optim import AdamW

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.deformable_detr import DeformableDETR, DeformableDETRConfig
from d3etr.detectors.denoising import DENOISING, DenoisingConfig, denoising_group, touching
from d3etr.distiller import Distiller
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.journal import Journal
from d3etr.engine.metric_logger import MetricLogger
from d3etr.structures import ImageBatch, Memory, ObjectQueries, QueryGroup, Targets

CLASSES = 3
TERMS = ("class", "l1", "giou")


class _Telling(DeformableDETRConfig):
    @property
    def proposals_tell_classes(self) -> bool:
        return True


class _Denoising(DeformableDETR):
    """A two-stage Deformable DETR that denoises, as another package would write it."""

    def __init__(self, config: DeformableDETRConfig, classes: int) -> None:
        super().__init__(config, classes)
        self.denoised_classes = nn.Embedding(classes + 1, config.width, padding_idx=classes)

    def object_queries(self, memory: Memory | None = None) -> ObjectQueries:
        queries = super().object_queries(memory)
        return touching(queries, self.denoised_classes.weight) if self.training else queries

    def training_groups(self, memory: Memory, targets: Targets, step: int) -> dict[str, QueryGroup]:
        table, config = self.denoised_classes.weight, DenoisingConfig(queries=8)
        return {DENOISING: denoising_group(targets, table, config, step=step)}


def student(kind: type[DeformableDETRConfig] = _Telling) -> _Denoising:
    torch.manual_seed(0)
    settings = tiny_detector_config(width=32, heads=4, **FAMILY["deformable-two-stage"])
    detector = _Denoising(
        kind.model_validate(settings.model_dump(mode="json"), strict=False), CLASSES
    )
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if "head" in name:
                parameter.normal_(std=0.2)
    return detector.train()


def learning(
    detector: DetectionTransformer, teacher: Any = None, method: str = "none", **criterion: Any
) -> Distiller:
    config = MethodConfig.parse({"method": method})
    return Distiller(detector, teacher, config, SetCriterionConfig(**criterion), seed=0)


def losses_of(
    module: Distiller, images: ImageBatch, targets: Targets, step: int = 0
) -> dict[str, Tensor]:
    taught = module.run_teacher(images, step, targets)
    sums = module.normalisers(targets, taught, step)
    return module(images, targets, taught, sums, step=step)


@pytest.mark.parametrize("class_loss", ["focal", "varifocal", "mal", "ia_bce"])
def test_a_few_steps_lower_the_loss_with_finite_gradients(
    class_loss: str, images: ImageBatch, targets: Targets
) -> None:
    module = learning(student(), class_loss=class_loss)
    optimiser = torch.optim.AdamW(module.parameters(), 2e-3)
    totals = []
    for step in range(12):
        losses = losses_of(module, images, targets, step)
        total = torch.stack(list(losses.values())).sum()
        optimiser.zero_grad()
        total.backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimiser.step()
        totals.append(total.item())
    expected = {f"{part}/{t}" for part in ("detection", "proposals", DENOISING) for t in TERMS}
    assert losses.keys() == expected
    assert sum(totals[-3:]) < 0.9 * sum(totals[:3])


def test_every_parameter_has_a_gradient_without_objects(
    images: ImageBatch, targets: Targets
) -> None:
    module = learning(student(), class_loss="varifocal")
    none = torch.zeros_like(targets.num_objects)
    empty = replace(targets, counts=(0, 0, 0), num_objects=none)
    losses = losses_of(module, images, empty)
    assert [*losses] == [*losses_of(module, images, targets)]
    assert all(losses[f"{DENOISING}/{term}"].item() == 0 for term in TERMS)
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("kind", ["rt_detr", "d_fine", "deimv2", "dino"])
def test_a_part_without_objects_has_the_losses_of_all_others(
    kind: str,
    tiny_detector: Callable[..., DetectionTransformer],
    images: ImageBatch,
    targets: Targets,
    tmp_path: Path,
) -> None:
    """Those of micro-batches are added up by name, those of workers in their order."""
    module = learning(tiny_detector(**FAMILY[kind]).train())
    log = MetricLogger(
        Journal(tmp_path / "journal"), SingleProcess(torch.device("cpu")), AdamW([torch.ones(1)])
    )
    found = []
    for chosen in ([0, 2], [1, 1]):
        assert images.padding is not None
        part = ImageBatch(images.pixels[chosen], images.padding[chosen])
        own = targets.of_images(chosen)
        found.append(losses_of(module, part, own))
        log.add(0, found[-1], own.image_ids).backward()
    first, empty = found
    assert [*first] == [*empty]
    idle = {name: loss.item() for name, loss in empty.items() if name.startswith(DENOISING)}
    assert {f"{DENOISING}/{term}" for term in TERMS} <= idle.keys() and not any(idle.values())
    log.add_norm(torch.ones(()))
    log.write(1)
    assert log.last[f"train/{DENOISING}/class"] == first[f"{DENOISING}/class"].item() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_denoising_changes_no_other_loss(images: ImageBatch, targets: Targets) -> None:
    detector = student()
    with_group = losses_of(learning(detector), images, targets)
    detector.training_groups = lambda *_: {}  # type: ignore[method-assign]
    without = losses_of(learning(detector), images, targets)
    assert without.keys() == {name for name in with_group if not name.startswith(DENOISING)}
    for name, loss in without.items():
        torch.testing.assert_close(with_group[name], loss, atol=1e-6, rtol=1e-6)


def test_images_without_labels_add_nothing(images: ImageBatch, targets: Targets) -> None:
    module = learning(student())
    mixed = replace(targets, labelled=2, counts=(2, 0, 0), num_objects=torch.tensor([2, 0, 0]))
    known = ImageBatch(images.pixels[:2], None if images.padding is None else images.padding[:2])
    first = losses_of(module, images, mixed)
    second = losses_of(module, known, targets.of_images([0, 1]))
    for name, loss in second.items():
        torch.testing.assert_close(first[name], loss, atol=1e-5, rtol=1e-5)


def test_the_same_step_draws_the_same_again(images: ImageBatch, targets: Targets) -> None:
    first, again, later = (losses_of(learning(student()), images, targets, n) for n in (4, 4, 5))
    name = f"{DENOISING}/class"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], later[name])
    assert torch.equal(first["detection/class"], later["detection/class"])


@pytest.mark.parametrize("method", ["d3etr", "kd_detr", "detrdistill"])
def test_methods_teach_a_student_that_denoises(
    method: str,
    tiny_detector: Callable[..., DetectionTransformer],
    images: ImageBatch,
    targets: Targets,
) -> None:
    teacher = tiny_detector(1, **FAMILY["deformable-two-stage"])
    module = learning(student(), teacher, method, class_loss="varifocal")
    losses = losses_of(module, images, targets)
    assert {f"{DENOISING}/{term}" for term in TERMS} <= losses.keys()
    total = torch.stack(list(losses.values())).sum()
    assert total.isfinite()
    total.backward()


def test_proposals_learn_classes_where_the_configuration_says_so(
    images: ImageBatch, targets: Targets
) -> None:
    """Else all objects are class 0 to them, whatever they are."""
    other = replace(targets, labels=torch.full_like(targets.labels, 2))
    for kind, tells in ((_Telling, True), (DeformableDETRConfig, False)):
        losses = [losses_of(learning(student(kind)), images, x) for x in (targets, other)]
        own, changed = (found["proposals/class"].item() for found in losses)
        assert (own != changed) is tells


def test_losses_under_autocast_are_near_those_without(images: ImageBatch, targets: Targets) -> None:
    exact = losses_of(learning(student(), class_loss="varifocal"), images, targets)
    module = learning(student(), class_loss="varifocal")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses_of(module, images, targets)
    for name, loss in rounded.items():
        assert loss.dtype == torch.float32
        if name.startswith(DENOISING):  # pairs are given: no matching can turn over
            assert loss.item() == pytest.approx(exact[name].item(), rel=0.05), name
    torch.stack(list(rounded.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
