"""The method's identities: what must hold whatever the weights are."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.methods import pairs as pairs_module
from d3etr.structures import ImageBatch, Targets

Build = Callable[..., DetectionTransformer]
DISTILLATION_TERMS = {"class", "l1", "giou", "self_attention", "cross_attention"}


def distiller(student: nn.Module, teacher: nn.Module | None, **settings: object) -> Distiller:
    config = MethodConfig.parse({"method": "none" if teacher is None else "d3etr", **settings})
    return Distiller(student, teacher, config, SetCriterionConfig(), seed=0)


def losses_of(
    module: Distiller, images: ImageBatch, targets: Targets, scale: float = 1.0
) -> dict[str, Tensor]:
    taught = module.run_teacher(images, targets=targets)
    return module(images, targets, taught, module.normalisers(targets, taught), scale)


def distilled(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in losses.items() if k.startswith(("adaptive/", "fixed/"))}


VARIANTS = {
    "default": {},
    "kl classes": {"prediction": {"class_loss": "kl", "temperature": 4.0}},
    "mse attention": {
        "self_attention": {"distance": "mse"},
        "cross_attention": {"distance": "mse"},
    },
    "heads averaged": {
        "self_attention": {"heads": "mean"},
        "cross_attention": {"heads": "mean"},
    },
    "part of the pairs": {"matched_pair_ratio": 0.4},
    "bce matching": {"matching_cost": {"class_distance": "bce"}},
    "uniform pairs": {"prediction": {"pair_weights": "uniform"}},
    "confident classes": {"prediction": {"class_pair_weights": "confidence"}},
    "confident attention": {"cross_attention": {"pair_weights": "confidence"}},
}


def tolerance(name: str) -> float:
    """Of a loss that should be 0.

    Boxes of a twentieth of the image make rounding twenty times larger in their overlap, for each
    of two sides and of all layers; processors round otherwise, up to 7e-5 was seen. A wrong pair
    costs a tenth at least.
    """
    return 5e-4 if name.endswith("giou") else 1e-5


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_all_losses_are_zero_when_student_is_teacher(
    some_detector: Build, images: ImageBatch, targets: Targets, settings: dict[str, object]
) -> None:
    _ensure_nothing_to_learn(some_detector(), images, targets, settings)


def test_so_they_are_for_every_detector(
    any_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    _ensure_nothing_to_learn(any_detector(), images, targets, {})


def _ensure_nothing_to_learn(
    teacher: DetectionTransformer,
    images: ImageBatch,
    targets: Targets,
    settings: dict[str, object],
) -> None:
    module = distiller(copy.deepcopy(teacher), teacher, **settings)
    losses = distilled(losses_of(module, images, targets))
    assert {name.split("/")[1] for name in losses} == DISTILLATION_TERMS
    assert all(abs(loss.item()) < tolerance(name) for name, loss in losses.items()), losses


def test_adaptive_losses_are_zero_whatever_part_of_the_queries_is_passed_on(
    any_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    # Fixed ones are not: the group lacks the other queries that the teacher's attended to.
    teacher = any_detector()
    module = distiller(copy.deepcopy(teacher), teacher, teacher_query_ratio=0.5)
    losses = distilled(losses_of(module, images, targets))
    adaptive = {name: x.item() for name, x in losses.items() if name.startswith("adaptive/")}
    assert len(adaptive) == 5
    assert all(abs(loss) < tolerance(name) for name, loss in adaptive.items()), adaptive


def test_losses_are_positive_when_student_differs(
    any_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    module = distiller(any_detector(seed=1), any_detector())
    losses = distilled(losses_of(module, images, targets))
    assert len(losses) == 10
    assert all(loss.item() > 1e-4 for loss in losses.values()), losses


def test_soft_target_bce_reaches_the_entropy_of_the_teacher(
    any_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    teacher = any_detector()
    prediction = {
        "class_loss": "bce",
        "class_pair_weights": "uniform",
        "class_weight": 1.0,
        "weight": 1.0,
    }
    module = distiller(copy.deepcopy(teacher), teacher, adaptive_ratio=0.0, prediction=prediction)
    taught = module.run_teacher(images)
    assert taught is not None
    probability = taught.main.logits.sigmoid()
    entropy = torch.special.entr(probability) + torch.special.entr(1 - probability)
    expected = entropy.sum(-1).mean((1, 2)).sum()
    assert losses_of(module, images, targets)["fixed/class"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def permuted(teacher: DetectionTransformer, order: Tensor) -> DetectionTransformer:
    """The same teacher with its queries in another order."""
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.startswith(("query_", "anchors")):
                parameter.copy_(parameter[order])
    return other


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_order_of_the_teachers_queries_changes_no_adaptive_loss(
    any_detector: Build, images: ImageBatch, targets: Targets, ratio: float
) -> None:
    teacher, student = any_detector(), any_detector(seed=1)
    if teacher.config.queries_need_images:
        return  # its queries come in the order of their scores
    settings = {"adaptive_ratio": 1.0, "matched_pair_ratio": ratio}
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    first = losses_of(distiller(student, teacher, **settings), images, targets)
    second = losses_of(distiller(student, permuted(teacher, order), **settings), images, targets)
    for name, loss in first.items():
        assert second[name].item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-6), name


def test_auxiliary_outputs_are_the_teachers_when_the_student_is_the_teacher(
    any_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    teacher = any_detector()
    module = distiller(copy.deepcopy(teacher), teacher)
    taught = module.run_teacher(images)
    assert taught is not None
    auxiliary = module._decode(images, targets, taught, 0)[0].groups["auxiliary"]
    for mine, theirs in (
        (auxiliary.logits, taught.main.logits),
        (auxiliary.boxes_cxcywh, taught.main.boxes_cxcywh),
        (auxiliary.self_attention, taught.main.self_attention),
        (auxiliary.cross_attention, taught.main.cross_attention),
    ):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_gradients_reach_the_student_only(
    any_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student, teacher = any_detector(seed=1).train(), any_detector()
    before = copy.deepcopy(teacher.state_dict())
    module = distiller(student, teacher)
    torch.stack(list(losses_of(module, images, targets).values())).sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not teacher.training


def test_the_teacher_is_no_part_of_the_module(any_detector: Build) -> None:
    student, teacher = any_detector(seed=1), any_detector()
    module = distiller(student, teacher)
    own = {id(p) for p in student.parameters()}
    assert {id(p) for p in module.parameters()} == own
    assert set(module.state_dict()) == {f"student.{name}" for name in student.state_dict()}


@pytest.mark.parametrize(("ratio", "absent"), [(1.0, ("fixed/", "auxiliary/")), (0.0, "adaptive/")])
def test_ratios_of_one_and_zero_are_the_pure_methods(
    any_detector: Build,
    images: ImageBatch,
    targets: Targets,
    ratio: float,
    absent: str | tuple[str, ...],
) -> None:
    student, teacher = any_detector(seed=1), any_detector()
    pure = losses_of(distiller(student, teacher, adaptive_ratio=ratio), images, targets)
    half = losses_of(distiller(student, teacher, adaptive_ratio=0.5), images, targets)
    assert not any(name.startswith(absent) for name in pure)
    for name, loss in distilled(pure).items():
        assert half[name].item() == pytest.approx(loss.item() / 2, rel=1e-5)


def test_detection_losses_are_those_of_the_plain_student(
    any_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student = any_detector(seed=1)
    plain = losses_of(distiller(student, None), images, targets)
    with_teacher = losses_of(distiller(student, any_detector()), images, targets)
    groups = ["detection", "proposals"] if student.config.queries_need_images else ["detection"]
    terms = {f"{group}/{term}" for group in groups for term in ("class", "l1", "giou")}
    terms |= {"detection/fgl", "detection/ddf"} if student.config.refines_distributions else set()
    assert set(plain) == terms
    for name, loss in plain.items():
        assert with_teacher[name].item() == pytest.approx(loss.item(), rel=1e-5)


def test_warm_up_scales_distillation_only(
    any_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    module = distiller(any_detector(seed=1), any_detector())
    full, half = (losses_of(module, images, targets, scale) for scale in (1.0, 0.5))
    for name, loss in full.items():
        factor = 0.5 if name.startswith(("adaptive/", "fixed/")) else 1.0
        assert half[name].item() == pytest.approx(factor * loss.item(), rel=1e-5)


def part(targets: Targets, index: slice) -> Targets:
    return replace(
        targets,
        labels=targets.labels[index],
        boxes_cxcywh=targets.boxes_cxcywh[index],
        counts=targets.counts[index],
        image_ids=targets.image_ids[index],
        original_sizes=targets.original_sizes[index],
        num_objects=targets.num_objects[index],
    )


def losses_in_pieces(
    module: Distiller, images: ImageBatch, targets: Targets
) -> list[dict[str, Tensor]]:
    """Losses of the batch in two micro-batches."""
    assert images.padding is not None
    pieces = [
        (ImageBatch(images.pixels[i], images.padding[i]), part(targets, i))
        for i in (slice(0, 2), slice(2, 3))
    ]
    taught = [module.run_teacher(batch) for batch, _ in pieces]
    sums = [module.normalisers(t, s) for (_, t), s in zip(pieces, taught, strict=True)]
    divisors = {name: sums[0][name] + sums[1][name] for name in sums[0]}
    return [module(batch, t, s, divisors) for (batch, t), s in zip(pieces, taught, strict=True)]


@pytest.mark.parametrize("queries", [6, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"matched_pair_ratio": 0.5},
        {"method": "kd_detr", "general_points": {"count": 5}},
        {"method": "detrdistill"},
    ],
    ids=["all", "half", "kd_detr", "detrdistill"],
)
def test_losses_of_micro_batches_add_up_to_those_of_the_batch(
    some_detector: Build,
    images: ImageBatch,
    targets: Targets,
    settings: dict[str, object],
    queries: int,
) -> None:
    module = distiller(some_detector(seed=1, queries=queries), some_detector(), **settings)
    whole = losses_of(module, images, targets)
    parts = losses_in_pieces(module, images, targets)
    for name, loss in whole.items():
        assert sum(p[name].item() for p in parts) == pytest.approx(loss.item(), rel=1e-4), name


WEIGHINGS = {"pair_weights": "confidence"}


@pytest.mark.parametrize("ratio", [1.0, 0.6])
@pytest.mark.parametrize(
    ("queries", "kind"),
    [(4, {}), (6, {}), (9, {}), (500, {"name": "deformable_detr", "levels": 2, "points": 2})],
    ids=["fewer", "as many", "more", "more than tokens"],
)
def test_weights_of_the_pairs_of_a_global_batch_sum_to_one(
    tiny_detector: Build,
    images: ImageBatch,
    targets: Targets,
    queries: int,
    kind: dict[str, object],
    ratio: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind:  # a two-stage detector has no more queries than tokens
        kind = kind | {"box_refinement": True, "two_stage": True}
    student = tiny_detector(seed=1, queries=queries, **kind)
    teacher = tiny_detector(queries=6 if queries < 100 else 200, **kind)
    module = distiller(
        student,
        teacher,
        matched_pair_ratio=ratio,
        adaptive_ratio=1.0,
        prediction={"class_pair_weights": "confidence"},
        self_attention=WEIGHINGS,
        cross_attention=WEIGHINGS,
    )
    totals: dict[str, list[Tensor]] = {"prediction_losses": [], "attention_loss": []}
    for name, seen in totals.items():
        spied = getattr(pairs_module, name)

        def spy(*given: Any, spied: Any = spied, seen: list[Tensor] = seen) -> Any:
            weights = [x for x in given if isinstance(x, Tensor) and x.dim() == 3]
            seen += [part.sum((1, 2)) for part in weights]
            return spied(*given)

        monkeypatch.setattr(pairs_module, name, spy)
    losses_in_pieces(module, images, targets)
    for name, seen in totals.items():
        assert len(seen) == 4, name  # classes and boxes, or both kinds of attention, of two pieces
        for first, second in zip(seen[:2], seen[2:], strict=True):
            torch.testing.assert_close(first + second, torch.ones_like(first))


@pytest.mark.parametrize(
    "settings",
    [{"matching_cost": {"class_distance": "bce"}}, {"method": "detrdistill"}],
    ids=["d3etr", "detrdistill"],
)
def test_losses_and_pairs_of_bfloat16_passes_are_computed_in_float32(
    any_detector: Build,
    images: ImageBatch,
    targets: Targets,
    settings: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = distiller(any_detector(seed=1), any_detector(), **settings)
    with torch.autocast("cpu", torch.bfloat16):
        taught = module.run_teacher(images)
        said = module._decode(images, targets, taught, 0)
        found = module(images, targets, taught, module.normalisers(targets, taught))
    monkeypatch.setattr(module, "_decode", lambda *_: said)
    exact = module(images, targets, taught, module.normalisers(targets, taught))
    for name, loss in exact.items():
        assert found[name].item() == pytest.approx(loss.item(), rel=1e-6), name


def test_a_batch_without_objects_has_finite_losses_and_gradients(
    any_detector: Build, images: ImageBatch
) -> None:
    empty = Targets(
        torch.zeros(3, 0, dtype=torch.int64),
        torch.zeros(3, 0, 4),
        (0, 0, 0),
        (1, 2, 3),
        ((32, 40),) * 3,
        torch.zeros(3, dtype=torch.int64),
    )
    student = any_detector(seed=1).train()
    losses = losses_of(distiller(student, any_detector()), images, empty)
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


SHAPES = {
    "one query": {"queries": 1},
    "fewer queries": {"queries": 4},
    "more queries": {"queries": 9},
    "fewer layers": {"decoder_layers": 1},
    "more layers": {"decoder_layers": 4},
    "narrower": {"width": 32},
    "wider": {"width": 96},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_teacher_and_student_of_other_shapes(
    some_detector: Build,
    images: ImageBatch,
    targets: Targets,
    shape: str,
) -> None:
    ratios = (0.5, 0.7) if list(SHAPES).index(shape) % 2 else (1.0, 1.0)
    student = some_detector(seed=1, **({"width": 64} | SHAPES[shape])).train()
    teacher = some_detector(width=64)
    # A query alone attends to nothing but itself, which is refused.
    alone: dict[str, object] = {"self_attention": {"weight": 0.0}}
    settings = alone if student.config.queries == 1 else {}
    module = distiller(
        student, teacher, teacher_query_ratio=ratios[0], matched_pair_ratio=ratios[1], **settings
    )
    losses = losses_of(module, images, targets)
    terms = 3
    if student.config.refines_distributions:  # the last layer's edges teach those before it
        terms += 1 + (student.config.decoder_layers > 1)
    own = [group for group in ("denoising", "copies") if f"{group}/class" in losses]
    supervised = 2 + len(own)  # and the main and the auxiliary group
    expected = terms * supervised + 3 * student.config.queries_need_images
    assert len(losses) == expected + (10 if student.config.queries > 1 else 8)
    assert all(torch.isfinite(loss) and loss >= -1e-5 for loss in losses.values()), losses
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_other_head_counts_are_averaged(
    any_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    averaged = {"heads": "mean"}
    module = distiller(
        any_detector(seed=1, heads=2),
        any_detector(),
        self_attention=averaged,
        cross_attention=averaged,
    )
    assert len(distilled(losses_of(module, images, targets))) == 10


def test_other_strides_resize_the_teachers_maps(
    any_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    coarse = {"name": "small", "stem_width": 8, "stage_widths": (8, 8, 8, 16)}
    module = distiller(any_detector(seed=1, backbone=coarse), any_detector())
    losses = distilled(losses_of(module, images, targets))
    assert len(losses) == 10 and all(torch.isfinite(loss) for loss in losses.values())
