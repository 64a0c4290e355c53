"""Images without labels: no detection loss there, distillation everywhere."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_distiller_identities import distiller, losses_of
from torch import Tensor

from d3etr.config.distillation import method_config
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.structures import ImageBatch, Targets

Build = Callable[..., DetectionTransformer]
LABELLED = 2
METHODS: dict[str, dict[str, Any]] = {
    "d3etr": {},
    "part of the teacher's queries": {"teacher_query_ratio": 0.5},
    "own assignment": {"auxiliary_group": {"assignment": "own"}},
    "general points": {"general_points": {"count": 3}},
    "inherited": {"inherited_ratio": 1.0},
    "refined teacher": {"refine_teacher": True},
    "kd_detr": {"method": "kd_detr"},
    "detrdistill": {"method": "detrdistill"},
}
OF_GROUND_TRUTH = ("detection/", "auxiliary/", "proposals/", "features")
"""Losses that need to know what is on an image."""


def part(images: ImageBatch, targets: Targets, chosen: Sequence[int]) -> tuple[ImageBatch, Targets]:
    """Some images of a batch by themselves, padded as the whole batch is."""
    rows = [*chosen]
    padding = None if images.padding is None else images.padding[rows]
    return ImageBatch(images.pixels[rows], padding), targets.of_images(rows)


def mixed(targets: Targets) -> Targets:
    """The same batch of which the last image has no labels."""
    return replace(
        targets,
        labelled=LABELLED,
        counts=(*targets.counts[:LABELLED], 0),
        num_objects=targets.num_objects * torch.tensor([1, 1, 0]),
    )


def gradients(losses: dict[str, Tensor], module: Distiller) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    torch.stack([*losses.values()]).sum().backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
    }


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def taught(request: pytest.FixtureRequest, some_detector: Build) -> Distiller:
    inherited = "inherited_ratio" in request.param
    teacher = some_detector(seed=1, queries=6 if inherited else 8)
    if "refine_teacher" in request.param and teacher.config.softmax_classes:
        pytest.skip("one class's score by itself is no softmax's")
    needs_own = inherited or "general_points" in request.param or "kd_detr" in str(request.param)
    if needs_own and teacher.config.queries_need_images:
        pytest.skip("a two-stage detector has no queries of its own")
    return distiller(some_detector(), teacher, **request.param).eval()


def test_a_mixed_batch_is_detection_on_one_part_and_distillation_on_all(
    taught: Distiller, images: ImageBatch, targets: Targets
) -> None:
    """A slow loop: each loss of the batch from the images it belongs to, one at a time.

    Losses are sums over images divided by sums over the batch, so they add up.
    """
    batch = mixed(targets)
    teacher = taught.run_teacher(images, targets=batch)
    normalisers = taught.normalisers(batch, teacher)
    found = taught(images, batch, teacher, normalisers)
    slow = dict.fromkeys(found, torch.zeros(()))
    for index in range(len(targets.counts)):
        alone = part(images, batch, [index])
        losses = taught(*alone, taught.run_teacher(alone[0], targets=alone[1]), normalisers)
        for name, loss in losses.items():
            if index < LABELLED or not name.startswith(OF_GROUND_TRUTH):
                slow[name] = slow[name] + loss
    for name, loss in found.items():
        torch.testing.assert_close(loss, slow[name], rtol=2e-4, atol=1e-5, msg=name)


def test_detection_is_that_of_the_labelled_part_alone(
    taught: Distiller, images: ImageBatch, targets: Targets
) -> None:
    """Values and normalisers: neither objects nor background of the others count."""
    whole = losses_of(taught, images, mixed(targets))
    alone = losses_of(taught, *part(images, targets, range(LABELLED)))
    names = [name for name in whole if name.startswith(OF_GROUND_TRUTH)]
    assert any(name.startswith("detection/") for name in names)
    for name in names:
        torch.testing.assert_close(whole[name], alone[name], rtol=2e-4, atol=1e-5, msg=name)


def test_what_is_on_an_unlabelled_image_changes_nothing(
    taught: Distiller, images: ImageBatch, targets: Targets
) -> None:
    batch = mixed(targets)
    boxes, labels = batch.boxes_cxcywh.clone(), batch.labels.clone()
    boxes[LABELLED:], labels[LABELLED:] = torch.tensor([0.2, 0.4, 0.3, 0.1]), 2
    others = replace(batch, boxes_cxcywh=boxes, labels=labels)
    first, second = (losses_of(taught, images, each) for each in (batch, others))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    before, after = gradients(first, taught), gradients(second, taught)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_unlabelled_image_teaches_and_is_no_empty_one(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    module = distiller(tiny_detector(), tiny_detector(seed=1)).eval()
    empty = replace(mixed(targets), labelled=None)
    unknown = losses_of(module, images, mixed(targets))
    known = losses_of(module, images, empty)
    assert not torch.equal(unknown["detection/class"], known["detection/class"])
    assert torch.equal(unknown["adaptive/class"], known["adaptive/class"])
    lone = distiller(tiny_detector(), tiny_detector(seed=1)).eval()
    pixels = images.pixels.clone()
    pixels[LABELLED:] += 1
    other = losses_of(lone, ImageBatch(pixels, images.padding), mixed(targets))
    assert not torch.equal(unknown["fixed/class"], other["fixed/class"])
    torch.testing.assert_close(unknown["detection/class"], other["detection/class"])


@pytest.mark.parametrize(
    ("settings", "learns"),
    [
        ({"method": "none"}, False),
        ({"method": "d3etr"}, True),
        ({"method": "kd_detr"}, True),
        ({"method": "detrdistill"}, True),
        ({"method": "detrdistill", "prediction": {"weight": 0.0}}, False),
    ],
)
def test_methods_know_whether_they_learn_without_labels(
    settings: dict[str, Any], learns: bool
) -> None:
    assert method_config(**settings).learns_without_labels is learns
