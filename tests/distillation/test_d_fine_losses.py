"""A D-FINE learns: all its losses through the distiller, however the batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import FAMILY
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.structures import ImageBatch, Targets

MakeDetector = Callable[..., DetectionTransformer]
TERMS = ("class", "l1", "giou")
EDGES = ("fgl", "ddf")
NAMES = {f"{group}/{term}" for group in ("detection", "denoising") for term in (*TERMS, *EDGES)}
NAMES |= {f"proposals/{term}" for term in TERMS}
WITHOUT_DENOISING = {"denoising": {"queries": 0}}


def learning(
    make: MakeDetector, detector: Any = None, method: str = "none", teacher: Any = None, **own: Any
) -> Distiller:
    """A student in training mode, with the criterion that its kind has."""
    student = make(**FAMILY["d_fine"], **(detector or {})).train()
    criterion = SetCriterionConfig(**{**student.config.criterion_defaults, **own})
    return Distiller(student, teacher, MethodConfig.parse({"method": method}), criterion, seed=0)


def without_batch_statistics(module: Distiller) -> Distiller:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    return module


def losses_of(
    module: Distiller, images: ImageBatch, targets: Targets, sums: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    taught = module.run_teacher(images, 0, targets)
    return module(images, targets, taught, sums or module.normalisers(targets, taught))


def total_of(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([*losses.values()]).sum()


def assert_finite_gradients(module: Distiller) -> None:
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("own", [{}, {"class_loss": "mal"}, {"union_matching": False}])
def test_a_few_steps_lower_the_loss_with_finite_gradients(
    own: Any, tiny_detector: MakeDetector, images: ImageBatch, targets: Targets
) -> None:
    module = learning(tiny_detector, **own)
    assert module.supervision.criterion.union_matching is own.get("union_matching", True)
    optimiser = torch.optim.AdamW(module.parameters(), 2e-3)
    totals = []
    for _ in range(12):
        losses = losses_of(module, images, targets)
        optimiser.zero_grad()
        total_of(losses).backward()
        assert_finite_gradients(module)
        optimiser.step()
        totals.append(total_of(losses).item())
    assert losses.keys() == NAMES
    assert all(loss > 0 for loss in losses.values())
    assert sum(totals[-3:]) < 0.9 * sum(totals[:3])


@pytest.mark.parametrize("width", [0, 2])
def test_every_parameter_has_a_gradient_without_objects(
    width: int, tiny_detector: MakeDetector, images: ImageBatch, targets: Targets
) -> None:
    module = learning(tiny_detector)
    empty = replace(
        targets,
        labels=targets.labels[:, :width],
        boxes_cxcywh=targets.boxes_cxcywh[:, :width],
        counts=(0, 0, 0),
        num_objects=torch.zeros_like(targets.num_objects),
    )
    losses = losses_of(module, images, empty)
    assert losses.keys() == NAMES
    for name in NAMES:
        if name.startswith("denoising/") or name.endswith(("/l1", "/giou", "/fgl")):
            assert losses[name] == 0, name
    total_of(losses).backward()
    assert_finite_gradients(module)


def test_images_without_labels_add_nothing(
    tiny_detector: MakeDetector, images: ImageBatch, targets: Targets
) -> None:
    module = without_batch_statistics(learning(tiny_detector))
    mixed = replace(targets, labelled=2, counts=(2, 0, 0), num_objects=torch.tensor([2, 0, 0]))
    assert images.padding is not None
    known = ImageBatch(images.pixels[:2], images.padding[:2])
    first = losses_of(module, images, mixed)
    second = losses_of(module, known, targets.of_images([0, 1]))
    assert first.keys() == second.keys() == NAMES
    for name, loss in second.items():
        torch.testing.assert_close(first[name], loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("union_matching", [True, False])
@pytest.mark.parametrize("counts", [(2, 0, 1), (9, 1, 0)])
def test_micro_batches_add_up_to_the_whole_batch(
    counts: tuple[int, ...],
    union_matching: bool,
    tiny_detector: MakeDetector,
    images: ImageBatch,
    targets: Targets,
) -> None:
    """Even where an image has more objects than there are queries."""
    module = learning(tiny_detector, WITHOUT_DENOISING, union_matching=union_matching)
    without_batch_statistics(module)
    generator = torch.Generator().manual_seed(5)
    targets = replace(
        targets,
        labels=torch.randint(3, (3, 9), generator=generator),
        boxes_cxcywh=torch.rand(3, 9, 4, generator=generator) * 0.4 + 0.1,
        counts=counts,
        num_objects=torch.tensor(counts),
    )
    assert images.padding is not None
    whole = losses_of(module, images, targets)
    parts = [
        (ImageBatch(images.pixels[chosen], images.padding[chosen]), targets.of_images(chosen))
        for chosen in ([0], [1, 2])
    ]
    sums = [module.normalisers(part, None) for _, part in parts]
    added = {name: torch.stack([part[name] for part in sums]).sum(0) for name in sums[0]}
    first, second = (losses_of(module, *part, added) for part in parts)
    assert whole.keys() == first.keys() == second.keys()
    for name, loss in whole.items():
        torch.testing.assert_close(first[name] + second[name], loss, atol=1e-5, rtol=1e-5)


def test_the_host_reads_nothing_of_the_losses(
    tiny_detector: MakeDetector, images: ImageBatch, targets: Targets
) -> None:
    """Once all is matched; on a GPU that matches itself, the host never waits."""
    module = learning(tiny_detector)
    sums, supervision = module.normalisers(targets, None), module.supervision
    student, groups, of_teacher = module._decode(images, targets, None, 0)
    inputs = student.groups, groups, student.memory.proposals
    problems = supervision.begin(*inputs, of_teacher, targets, sums)
    expected = problems()
    solved: list[Any] = []
    start = supervision.solver.start_named

    def remembered(blocks: Any) -> Any:
        found = start(blocks)()
        solved.append(found)
        return lambda: found

    supervision.solver.start_named = remembered  # type: ignore[method-assign]
    losses = supervision.begin(*inputs, of_teacher, targets, sums)
    assert solved
    with _NoReads():
        found = losses()
    for name, loss in expected.items():
        assert torch.equal(found[name], loss)


class _NoReads(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "unique_dim")
        return func(*args, **kwargs or {})


def test_losses_under_autocast_are_float32_and_near_those_without(
    tiny_detector: MakeDetector, images: ImageBatch, targets: Targets
) -> None:
    exact = losses_of(learning(tiny_detector), images, targets)
    module = learning(tiny_detector)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses_of(module, images, targets)
    for name, loss in rounded.items():
        assert loss.dtype == torch.float32
        if name.startswith("denoising"):  # pairs are given: no matching can turn over
            assert loss.item() == pytest.approx(exact[name].item(), rel=0.1), name
    total_of(rounded).backward()
    assert_finite_gradients(module)


def test_denoising_changes_no_other_loss(
    tiny_detector: MakeDetector, images: ImageBatch, targets: Targets
) -> None:
    module = learning(tiny_detector)
    with_group = losses_of(module, images, targets)
    module.student.training_groups = lambda *_: {}  # type: ignore[method-assign]
    without = losses_of(module, images, targets)
    assert without.keys() == {name for name in with_group if not name.startswith("denoising")}
    for name, loss in without.items():
        torch.testing.assert_close(with_group[name], loss, atol=1e-5, rtol=1e-5)


def test_a_weight_of_zero_leaves_a_term_out(
    tiny_detector: MakeDetector, images: ImageBatch, targets: Targets
) -> None:
    for key, terms in (("fgl_weight", ["ddf"]), ("ddf_weight", ["fgl"])):
        losses = losses_of(learning(tiny_detector, **{key: 0.0}), images, targets)
        found = {name.partition("/")[2] for name in losses if name.startswith("detection")}
        assert found == {*TERMS, *terms}


def test_one_layer_has_nobody_to_teach_it(
    tiny_detector: MakeDetector, images: ImageBatch, targets: Targets
) -> None:
    module = learning(tiny_detector, {"decoder_layers": 1})
    losses = losses_of(module, images, targets)
    assert losses.keys() == {name for name in NAMES if not name.endswith("/ddf")}
    total_of(losses).backward()
    assert_finite_gradients(module)


@pytest.mark.parametrize(
    "method", ["d3etr", "kd_detr", "detrdistill", "clockdistill", "qskd", "distribution"]
)
def test_methods_teach_a_student_that_refines_edges(
    method: str, tiny_detector: MakeDetector, images: ImageBatch, targets: Targets
) -> None:
    teacher = tiny_detector(1, **FAMILY["d_fine"])
    module = learning(tiny_detector, method=method, teacher=teacher)
    losses = losses_of(module, images, targets)
    assert NAMES < losses.keys()
    total_of(losses).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_the_last_layer_learns_nothing_from_itself(
    tiny_detector: MakeDetector, images: ImageBatch, targets: Targets
) -> None:
    """DDF alone moves the box heads of earlier layers only."""
    module = learning(tiny_detector, WITHOUT_DENOISING)
    losses = losses_of(module, images, targets)
    losses["detection/ddf"].backward()
    first, last = module.student.decoder.box_heads  # type: ignore[union-attr,misc]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in first.parameters())
    assert all(p.grad is None or not p.grad.any() for p in last.parameters())
