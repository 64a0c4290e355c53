"""Denoising queries as points: the same noised ground truth through both decoders, by index."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import FAMILY
from torch import Tensor, nn
from torch.nn import functional

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.config.views import ViewsConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.denoising import DENOISING, denoising_of
from d3etr.detectors.rt_detr import RTDETR
from d3etr.distiller import Distiller
from d3etr.engine.views import require_storable
from d3etr.errors import UserError
from d3etr.matching.boxes import cxcywh_to_xyxy, generalised_iou
from d3etr.methods.denoising_points import DENOISING_POINTS
from d3etr.structures import DecoderOutputs, ImageBatch, ObjectQueries, Targets

Build = Callable[..., DetectionTransformer]
DENOISES = ("rt_detr", "d_fine")
FEW = {"denoising": {"queries": 4}}
"""Two blocks in a batch whose fullest image has two objects."""
TERMS = {f"{DENOISING_POINTS}/{x}" for x in ("class", "l1", "giou")}
MAPS = {f"{DENOISING_POINTS}/{x}_attention" for x in ("self", "cross")}
ALONE = {"method": "kd_detr", "general_points": {"count": 0}, "denoising_points": {"weight": 1.0}}


def distiller(student: nn.Module, teacher: nn.Module, **settings: Any) -> Distiller:
    given = {"method": "d3etr", "denoising_points": {"weight": 1.0}} | settings
    return Distiller(student, teacher, MethodConfig.parse(given), SetCriterionConfig(), seed=0)


def in_training(detector: DetectionTransformer) -> DetectionTransformer:
    """It brings its training groups; batch norm stays as of evaluation, the same for any batch."""
    detector.train()
    for module in detector.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return detector


def losses_of(
    module: Distiller, images: ImageBatch, targets: Targets, step: int = 0
) -> dict[str, Tensor]:
    taught = module.run_teacher(images, step, targets)
    return module(images, targets, taught, module.normalisers(targets, taught), step=step)


def points_of(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in losses.items() if name.startswith(DENOISING_POINTS)}


@pytest.mark.filterwarnings("ignore:distillation.cross_attention compares feature levels")
@pytest.mark.parametrize("teacher_kind", DENOISES)
@pytest.mark.parametrize("student_kind", DENOISES)
@pytest.mark.parametrize("method", ["d3etr", "kd_detr"])
def test_kinds_that_denoise_teach_each_other(
    tiny_detector: Build,
    images: ImageBatch,
    targets: Targets,
    student_kind: str,
    teacher_kind: str,
    method: str,
) -> None:
    student = tiny_detector(seed=1, **FAMILY[student_kind] | FEW).train()
    teacher = tiny_detector(width=64, **FAMILY[teacher_kind])
    module = distiller(student, teacher, method=method)
    losses = losses_of(module, images, targets)
    found = points_of(losses)
    assert found.keys() == (TERMS | MAPS if method == "d3etr" else TERMS)
    assert all(loss.isfinite() and loss > 1e-7 for loss in found.values()), found
    torch.stack([*losses.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("kind", DENOISES)
def test_nothing_is_left_to_learn_when_the_student_is_the_teacher(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kind: str
) -> None:
    teacher = tiny_detector(**FAMILY[kind] | FEW)
    student = in_training(copy.deepcopy(teacher))
    losses = points_of(losses_of(distiller(student, teacher), images, targets, step=3))
    assert losses.keys() == TERMS | MAPS
    assert all(abs(loss.item()) < 5e-5 for loss in losses.values()), losses


def decoded_alone(
    detector: DetectionTransformer, student: DetectionTransformer, images: ImageBatch, of: Targets
) -> DecoderOutputs:
    """What a detector says about the student's denoising queries, beside its own queries alone."""
    noise = denoising_of(student.config)
    assert noise is not None
    memory = detector.encode(images)
    group = detector.denoising_queries(of, noise, step=7)
    queries = [detector.object_queries(memory), group.queries]
    return detector.decode(memory, queries, attention=True, maps_of_blocks=True)[1]


def box_terms(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    corners = (cxcywh_to_xyxy(x)[None] for x in (ours, theirs))
    return (ours - theirs).abs().sum().item(), 1 - generalised_iou(*corners).item()


@pytest.mark.parametrize("kinds", [("rt_detr", "d_fine"), ("d_fine", "rt_detr")])
def test_losses_equal_a_loop_over_images_blocks_and_objects(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kinds: tuple[str, str]
) -> None:
    student = in_training(tiny_detector(seed=1, **FAMILY[kinds[0]] | FEW))
    teacher = tiny_detector(decoder_layers=2, **FAMILY[kinds[1]] | {"denoising": {"queries": 50}})
    flat = {"weight": 1.0, "class_loss": "bce", "class_weight": 1.0, "temperature": 1.0}
    weights = {"l1_weight": 1.0, "giou_weight": 1.0, "class_pair_weights": "every"}
    settings = ALONE | {"prediction": flat | weights, "layer_map": "uniform"}
    losses = losses_of(distiller(student, teacher, **settings), images, targets, step=7)
    ours, theirs = (decoded_alone(x, student, images, targets) for x in (student, teacher))
    sums, total, fullest, blocks = dict.fromkeys(("class", "l1", "giou"), 0.0), 0.0, 2, 2
    for layer in range(2):
        parts, confidences = dict.fromkeys(sums, 0.0), 0.0
        for image, objects in enumerate(targets.counts):
            for block in range(blocks):
                for slot in [*range(objects), *range(fullest, fullest + objects)]:
                    n = block * 2 * fullest + slot
                    target = theirs.logits[layer, image, n].sigmoid()
                    confidence = target.max().item() / blocks
                    confidences += confidence
                    parts["class"] += (
                        functional.binary_cross_entropy_with_logits(
                            ours.logits[layer, image, n], target, reduction="sum"
                        ).item()
                        / blocks
                    )
                    boxes = (x.boxes_cxcywh[layer, image, n] for x in (ours, theirs))
                    l1, giou = box_terms(*boxes)
                    parts["l1"] += confidence * l1
                    parts["giou"] += confidence * giou
        sums = {name: sums[name] + part / confidences for name, part in parts.items()}
        total += confidences
    assert total > 0
    for name, expected in sums.items():
        assert losses[f"{DENOISING_POINTS}/{name}"].item() == pytest.approx(expected, rel=1e-4)


def test_attention_equals_a_loop_over_queries_with_an_object(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    """Rows are renormalised to queries of the same block that are made of an object."""
    student = in_training(tiny_detector(seed=1, **FAMILY["rt_detr"] | FEW))
    teacher = tiny_detector(**FAMILY["rt_detr"])
    settings = ALONE | {
        "prediction": {"weight": 0.0},
        "self_attention": {"weight": 1.0},
        "cross_attention": {"weight": 1.0},
        "auxiliary_group": {"ground_truth": False},
        "layer_map": "uniform",
    }
    losses = losses_of(distiller(student, teacher, **settings), images, targets, step=7)
    ours, theirs = (decoded_alone(x, student, images, targets) for x in (student, teacher))
    size, fullest, found = 4, 2, {"self": 0.0, "cross": 0.0}
    for image, objects in enumerate(targets.counts):
        used = [*range(objects), *range(fullest, fullest + objects)]
        for n in [block * size + slot for block in range(2) for slot in used]:
            for kind in found:
                maps = [getattr(x, f"{kind}_attention")[:, image, :, n] for x in (ours, theirs)]
                if kind == "self":
                    maps = [x[..., used] / x[..., used].sum(-1, keepdim=True) for x in maps]
                mine, other = maps
                rows = (other * (other.clamp(min=1e-30) / mine.clamp(min=1e-30)).log()).sum(-1)
                found[kind] += rows.mean().item() / 2
    counted = 2 * sum(targets.counts)
    for kind, total in found.items():
        loss = losses[f"{DENOISING_POINTS}/{kind}_attention"].item()
        assert loss == pytest.approx(total / counted, rel=1e-3), kind


def test_the_students_own_group_is_reused(
    tiny_detector: Build,
    images: ImageBatch,
    targets: Targets,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One group of noised objects in each decoder, and no other loss changes."""
    student = in_training(tiny_detector(seed=1, **FAMILY["rt_detr"] | FEW))
    teacher = tiny_detector(**FAMILY["rt_detr"])
    decode, seen = RTDETR.decode, []

    def watched(self: Any, memory: Any, groups: Sequence[ObjectQueries], **asked: Any) -> Any:
        seen.append((self is teacher, [group.blocks for group in groups]))
        return decode(self, memory, groups, **asked)

    monkeypatch.setattr(RTDETR, "decode", watched)
    with_points = losses_of(distiller(student, teacher), images, targets)
    assert seen == [(True, [0, 2]), (False, [0, 2, 0])]
    seen.clear()
    plain = losses_of(distiller(student, teacher, denoising_points={}), images, targets)
    assert seen == [(True, [0]), (False, [0, 2, 0])]
    assert plain.keys() == with_points.keys() - TERMS - MAPS
    for name, loss in plain.items():
        torch.testing.assert_close(with_points[name], loss, atol=1e-6, rtol=1e-6)


def test_both_decode_the_same_boxes_and_classes(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student = tiny_detector(seed=1, **FAMILY["d_fine"] | FEW)
    teacher = tiny_detector(width=64, **FAMILY["rt_detr"])
    noise = denoising_of(student.config)
    assert noise is not None
    groups = [x.denoising_queries(targets, noise, step=5) for x in (student, teacher)]
    ours, theirs = (group.queries for group in groups)
    assert ours.reference_logits is not None and theirs.reference_logits is not None
    assert torch.equal(ours.reference_logits, theirs.reference_logits)
    tables = [x.label_embedding.weight for x in (student, teacher) if x.label_embedding]
    classes = [
        torch.cdist(part.content, table[None].expand(3, -1, -1)).argmin(-1)
        for part, table in zip((ours, theirs), tables, strict=True)
        if part.content is not None
    ]
    assert torch.equal(*classes)


def test_images_without_labels_add_nothing(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student = in_training(tiny_detector(seed=1, **FAMILY["rt_detr"] | FEW))
    module = distiller(student, tiny_detector(**FAMILY["rt_detr"]), **ALONE)
    mixed = replace(targets, labelled=2, counts=(2, 0, 0), num_objects=torch.tensor([2, 0, 0]))
    assert images.padding is not None
    known = ImageBatch(images.pixels[:2], images.padding[:2])
    first = points_of(losses_of(module, images, mixed))
    second = points_of(losses_of(module, known, targets.of_images([0, 1])))
    assert first.keys() == second.keys() == TERMS
    for name, loss in second.items():
        torch.testing.assert_close(first[name], loss, atol=1e-5, rtol=1e-5)


def test_an_object_counts_the_same_however_the_batch_is_cut(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    """Blocks and slots differ between cuts; what all queries of an object count does not."""
    student = tiny_detector(seed=1, **FAMILY["rt_detr"] | FEW).train()
    module = distiller(student, tiny_detector(**FAMILY["rt_detr"]))
    name = f"{DENOISING_POINTS}/queries"

    def sums(chosen: list[int]) -> dict[str, Tensor]:
        assert images.padding is not None
        part = ImageBatch(images.pixels[chosen], images.padding[chosen])
        objects = targets.of_images(chosen)
        return module.normalisers(objects, module.run_teacher(part, 0, objects))

    whole, parts = sums([0, 1, 2]), [sums([n]) for n in range(3)]
    assert whole[name].item() == 2 * sum(targets.counts)
    assert sum(part[name].item() for part in parts) == whole[name].item()
    assert all([*part] == [*whole] for part in parts)
    shapes = {name: value.shape for name, value in whole.items()}
    assert all({name: value.shape for name, value in part.items()} == shapes for part in parts)


@pytest.mark.parametrize("normaliser", ["confidence", "objects"])
def test_a_batch_without_objects_has_such_losses_of_0(
    tiny_detector: Build, images: ImageBatch, targets: Targets, normaliser: str
) -> None:
    student = tiny_detector(seed=1, **FAMILY["rt_detr"] | FEW).train()
    module = distiller(student, tiny_detector(**FAMILY["rt_detr"]), normaliser=normaliser)
    nothing = replace(targets, counts=(0, 0, 0), num_objects=torch.zeros_like(targets.num_objects))
    losses = losses_of(module, images, nothing)
    assert [*losses] == [*losses_of(module, images, targets)]
    found = points_of(losses)
    assert found.keys() == TERMS | MAPS and all(loss.item() == 0 for loss in found.values())
    torch.stack([*losses.values()]).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("student", "teacher", "text"),
    [
        ("conditional_detr", "rt_detr", r"the student \(conditional_detr\) has none: set dist"),
        ("rt_detr", "deformable-two-stage", r"the teacher \(deformable_detr\) has none: set dis"),
        ("detr", "detr", r"the student \(detr\) and the teacher \(detr\) have none"),
    ],
)
def test_a_kind_without_denoising_is_refused(
    tiny_detector: Build, student: str, teacher: str, text: str
) -> None:
    pair = tiny_detector(**FAMILY[student]), tiny_detector(**FAMILY[teacher])
    without_maps = {"cross_attention": {"weight": 0.0}}
    with pytest.raises(UserError, match=text):
        distiller(*pair, **without_maps)


def test_a_student_that_switched_denoising_off_is_told_the_key(tiny_detector: Build) -> None:
    student = tiny_detector(**FAMILY["rt_detr"] | {"denoising": {"queries": 0}})
    with pytest.raises(UserError, match=r"set student\.detector\.denoising\.queries above 0, or"):
        distiller(student, tiny_detector(**FAMILY["rt_detr"]))


def test_stored_views_hold_no_denoising_queries(tiny_detector: Build) -> None:
    pair = tiny_detector(seed=1, **FAMILY["rt_detr"]), tiny_detector(**FAMILY["rt_detr"])
    text = "cannot hold denoising queries.*set distillation.denoising_points.weight to 0"
    with pytest.raises(UserError, match=text):
        require_storable(distiller(*pair).method, ViewsConfig(count=2), 6)


NO_TERMS = {f"{x}_attention": {"weight": 0.0} for x in ("self", "cross")}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (NO_TERMS | {"prediction": {"weight": 0.0}}, "denoising_points have no effect"),
        ({"cross_attention": {"queries": "summed", "distance": "mse"}}, "queries to 'each'"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        MethodConfig.parse({"method": "d3etr", "denoising_points": {"weight": 1.0}} | settings)


def test_images_of_the_dataset_alone_decide_the_noise(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student = in_training(tiny_detector(seed=1, **FAMILY["rt_detr"] | FEW))
    module = distiller(student, tiny_detector(**FAMILY["rt_detr"]), **ALONE)
    first, again, later = (points_of(losses_of(module, images, targets, n)) for n in (4, 4, 5))
    name = f"{DENOISING_POINTS}/class"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], later[name])
    empty = module.run_teacher(images, 0, targets.of_images([1, 1, 1]))
    assert empty is not None and empty.groups[DENOISING].outputs.queries == 0


def test_a_few_steps_lower_the_losses_over_the_pairs(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student = in_training(tiny_detector(seed=1, **FAMILY["d_fine"] | FEW))
    module = distiller(student, tiny_detector(seed=5, **FAMILY["rt_detr"]), **ALONE)
    optimiser = torch.optim.Adam(module.parameters(), 1e-2)
    found = []
    for _ in range(10):
        total = torch.stack([*points_of(losses_of(module, images, targets)).values()]).sum()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        found.append(total.item())
    assert found[-1] < 0.7 * found[0], found
