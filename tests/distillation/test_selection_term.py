"""Distilling selection: the teacher's encoder scores on the student's grid."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import FAMILY
from torch import Tensor, nn
from torch.nn import functional

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.config.views import ViewsConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.places import scores_on_grid
from d3etr.distiller import Distiller
from d3etr.engine.views import require_storable
from d3etr.errors import UserError
from d3etr.methods.encoder_selection import token_scores
from d3etr.structures import Grids, ImageBatch, Memory, Targets, TokenScores

Build = Callable[..., DetectionTransformer]
TELLING = ("rt_detr", "d_fine")
COARSER = {"backbone": {"name": "small", "stem_width": 8, "stage_widths": (8, 8, 8, 16)}}
ALONE: dict[str, Any] = {
    "method": "d3etr",
    "adaptive_ratio": 1.0,
    "prediction": {"weight": 0.0},
    "self_attention": {"weight": 0.0},
    "cross_attention": {"weight": 0.0},
}


def distiller(student: nn.Module, teacher: nn.Module, **settings: Any) -> Distiller:
    given = ALONE | {"selection": {"weight": 1.0}} | settings
    return Distiller(student, teacher, MethodConfig.parse(given), SetCriterionConfig(), seed=0)


def losses_of(module: Distiller, images: ImageBatch, targets: Targets) -> dict[str, Tensor]:
    taught = module.run_teacher(images, targets=targets)
    return module(images, targets, taught, module.normalisers(targets, taught))


def loop(scores: TokenScores, theirs: Grids, own: Grids) -> Tensor:
    """``scores_on_grid``, token by token."""
    images, classes = len(scores.logits), scores.logits.shape[2]
    starts = [sum(h * w for h, w in own.levels[:n]) for n in range(len(own.levels))]
    found = torch.full((images, sum(h * w for h, w in own.levels), classes), float("-inf"))
    silent = scores.silent.expand(images, -1)
    for image in range(images):
        token = 0
        for (height, width), stride in zip(*theirs, strict=True):
            ratios = [max(x / stride, stride / x) for x in own.strides]
            level = ratios.index(min(ratios))
            rows, columns = own.levels[level]
            for row in range(height):
                for column in range(width):
                    y, x = (row + 0.5) / height, (column + 0.5) / width
                    cell = starts[level] + int(y * rows) * columns + int(x * columns)
                    if not silent[image, token]:
                        best = torch.maximum(found[image, cell], scores.logits[image, token])
                        found[image, cell] = best
                    token += 1
    return found


GRIDS = {
    "the same": (((4, 6), (2, 3)), (8, 16), ((4, 6), (2, 3)), (8, 16)),
    "the finest level is missing": (
        ((8, 8), (4, 4), (2, 2)),
        (8, 16, 32),
        ((4, 4), (2, 2)),
        (16, 32),
    ),
    "a level more": (((4, 4), (2, 2)), (16, 32), ((8, 8), (4, 4), (2, 2)), (8, 16, 32)),
    "a larger picture": (((7, 9), (4, 5)), (8, 16), ((4, 5), (2, 3)), (8, 16)),
    "no stride in common": (((5, 7),), (14,), ((4, 6), (2, 3)), (8, 16)),
}


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
def test_scores_on_a_grid_equal_a_loop_over_tokens(grids: tuple[Any, ...]) -> None:
    theirs, own = Grids(*grids[:2]), Grids(*grids[2:])
    tokens = sum(h * w for h, w in theirs.levels)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, tokens, 3, generator=generator)
    silent = torch.rand(2, tokens, generator=generator) < 0.3
    scores = TokenScores(logits, silent)
    found = scores_on_grid(scores, theirs, own)
    assert torch.equal(found, loop(scores, theirs, own))
    assert found.isfinite().any()


@pytest.mark.parametrize("teacher_kind", TELLING)
@pytest.mark.parametrize("student_kind", TELLING)
def test_kinds_whose_encoders_tell_classes_teach_each_other(
    tiny_detector: Build,
    images: ImageBatch,
    targets: Targets,
    student_kind: str,
    teacher_kind: str,
) -> None:
    student = tiny_detector(seed=1, **FAMILY[student_kind]).train()
    teacher = tiny_detector(queries=8, width=64, **FAMILY[teacher_kind] | COARSER)
    module = distiller(student, teacher)
    losses = losses_of(module, images, targets)
    assert losses["selection"] > 1e-6
    losses["selection"].backward()
    assert student.proposals.class_head.weight.grad.abs().sum() > 0
    assert next(student.backbone.parameters()).grad.abs().sum() > 0
    assert next(student.decoder.layers.parameters()).grad is None
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("kind", TELLING)
def test_a_teacher_has_nothing_to_tell_itself(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kind: str
) -> None:
    """The focal form is 0, the cross entropy the teacher's entropy; neither has a gradient."""
    teacher = tiny_detector(**FAMILY[kind])
    student = copy.deepcopy(teacher).requires_grad_(True)
    for form in ("focal", "bce"):
        module = distiller(student, teacher, selection={"weight": 1.0, "class_loss": form})
        taught = module.run_teacher(images, targets=targets)
        sums = module.normalisers(targets, taught)
        loss = module(images, targets, taught, sums)["selection"]
        logits, silent = token_scores(teacher.encode(images))
        p = logits.sigmoid()
        entropy = (torch.special.entr(p) + torch.special.entr(1 - p)).sum(-1)
        expected = (entropy * ~silent).sum() / sums["selection"]
        assert loss.item() == pytest.approx(0.0 if form == "focal" else expected.item(), rel=1e-5)
        student.zero_grad()
        loss.backward()
        gradients = [p.grad.abs().max() for p in student.parameters() if p.grad is not None]
        assert torch.stack(gradients).max() < 1e-6


def test_the_loss_equals_a_loop_over_tokens_that_propose_something(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    """Under padding nothing counts, and the divisor is that of the tokens it would select."""
    student = tiny_detector(seed=1, **FAMILY["rt_detr"])
    teacher = tiny_detector(queries=5, **FAMILY["d_fine"])
    module = distiller(student, teacher, selection={"weight": 3.0})
    ours, theirs = (token_scores(x.encode(images)) for x in (student, teacher))
    assert ours.silent.any() and not ours.silent.all()
    total = confidence = 0.0
    for image in range(3):
        best = []
        for token in range(ours.logits.shape[1]):
            if ours.silent[image, token]:
                continue
            z, target = ours.logits[image, token], theirs.logits[image, token].sigmoid()
            entropy = functional.binary_cross_entropy_with_logits(z, target, reduction="none")
            total += ((target - z.sigmoid()).square() * entropy).sum().item()
            best.append(target.max().item())
        confidence += sum(sorted(best)[-5:])
    loss = losses_of(module, images, targets)["selection"].item()
    assert loss == pytest.approx(3 * total / confidence, rel=1e-4)


def test_neither_padding_nor_the_order_of_images_matters(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    module = distiller(
        tiny_detector(seed=1, **FAMILY["rt_detr"]), tiny_detector(**FAMILY["rt_detr"])
    )
    loss = losses_of(module, images, targets)["selection"]
    taught = module.run_teacher(images, targets=targets)
    assert taught is not None and taught.memory is not None and taught.memory.scores is not None
    logits, silent = taught.memory.scores
    other = logits.masked_fill(silent[..., None], 50.0)
    memory = replace(taught.memory, scores=TokenScores(other, silent))
    hidden = replace(taught, memory=memory)
    again = module(images, targets, hidden, module.normalisers(targets, hidden))["selection"]
    assert torch.equal(again, loss)
    order = [2, 0, 1]
    assert images.padding is not None
    turned = ImageBatch(images.pixels[order], images.padding[order])
    moved = losses_of(module, turned, targets.of_images(order))["selection"]
    torch.testing.assert_close(moved, loss, atol=1e-6, rtol=1e-5)


def test_images_without_labels_count_as_all_others(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    module = distiller(
        tiny_detector(seed=1, **FAMILY["rt_detr"]), tiny_detector(**FAMILY["rt_detr"])
    )
    mixed = replace(targets, labelled=2, counts=(2, 0, 0), num_objects=torch.tensor([2, 0, 0]))
    losses = [losses_of(module, images, part)["selection"] for part in (targets, mixed)]
    assert torch.equal(*losses)
    assert module.method.config.learns_without_labels


def test_proposals_of_all_tokens_are_scores_too(tiny_detector: Build, images: ImageBatch) -> None:
    memory = tiny_detector(**FAMILY["deformable-two-stage"]).encode(images)
    scores = token_scores(memory)
    assert memory.proposals is not None and memory.padding is not None
    assert scores.logits.shape == (3, memory.tokens.shape[1], 3)
    assert (scores.silent >= memory.padding).all() and not scores.silent.all()
    selected = Memory(memory.tokens, memory.position, memory.padding, memory.levels)
    with pytest.raises(UserError, match=r"set distillation\.selection\.weight to 0"):
        token_scores(selected)


@pytest.mark.parametrize(
    ("student", "teacher", "text"),
    [
        ("rt_detr", "deformable-two-stage", r"the teacher \(deformable_detr\) has none: set dist"),
        ("detr", "conditional_detr", r"the student \(detr\) and the teacher \(cond.* have none"),
    ],
)
def test_encoders_that_tell_no_classes_are_refused(
    tiny_detector: Build, student: str, teacher: str, text: str
) -> None:
    pair = tiny_detector(**FAMILY[student]), tiny_detector(**FAMILY[teacher])
    with pytest.raises(UserError, match=text):
        distiller(*pair)


def test_stored_views_hold_no_scores(tiny_detector: Build) -> None:
    pair = tiny_detector(seed=1, **FAMILY["rt_detr"]), tiny_detector(**FAMILY["rt_detr"])
    with pytest.raises(UserError, match=r"set distillation\.selection\.weight to 0"):
        require_storable(distiller(*pair).method, ViewsConfig(count=2), 6)
    require_storable(
        distiller(*pair, auxiliary_group={"always": True}, selection={}).method,
        ViewsConfig(count=2),
        6,
    )


def test_a_few_steps_teach_the_student_where_to_look(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student = tiny_detector(seed=1, **FAMILY["rt_detr"])
    teacher = tiny_detector(seed=5, **FAMILY["rt_detr"])
    module = distiller(student, teacher)
    optimiser = torch.optim.Adam(module.parameters(), 1e-2)
    found = []
    for _ in range(15):
        loss = losses_of(module, images, targets)["selection"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    assert found[-1] < 0.3 * found[0], found
