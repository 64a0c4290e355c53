"""CLoCKDistill's masks, queries made of objects and losses, against loops."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_distiller_identities import tolerance
from tiny import FAMILY
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.errors import UserError
from d3etr.losses.object_masks import object_shares
from d3etr.methods.adapters import TargetQueries
from d3etr.methods.clockdistill import CLoCKDistill
from d3etr.structures import ImageBatch, Levels, ObjectQueries, Targets

Build = Callable[..., DetectionTransformer]
KINDS = [name for name, settings in FAMILY.items() if settings["name"] != "detr"]


def build(student: DetectionTransformer, teacher: DetectionTransformer, **keys: Any) -> Distiller:
    config = MethodConfig.parse({"method": "clockdistill", "target_queries": 4, **keys})
    return Distiller(student, teacher, config, SetCriterionConfig(), seed=0)


def losses(module: Distiller, images: ImageBatch, targets: Targets) -> dict[str, Tensor]:
    taught = module.run_teacher(images, targets=targets)
    return module(images, targets, taught, module.normalisers(targets, taught))


def without_objects(targets: Targets) -> Targets:
    return replace(
        targets,
        labels=targets.labels[:, :0],
        boxes_cxcywh=targets.boxes_cxcywh[:, :0],
        counts=(0,) * len(targets.counts),
        num_objects=torch.zeros_like(targets.num_objects),
    )


def shares_by_loops(targets: Targets, padding: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    inside, outside = [], []
    for image, count in enumerate(targets.counts):
        start, ins, outs = 0, [], []
        for height, width in levels:
            hidden = padding[image, start : start + height * width].view(height, width)
            start += height * width
            rows, columns = int((~hidden[:, 0]).sum()), int((~hidden[0]).sum())
            areas = torch.full((height, width), math.inf)
            for x, y, w, h in targets.boxes_cxcywh[image, :count].tolist():
                cells = [
                    (row, column)
                    for row in range(rows)
                    for column in range(columns)
                    if row < (y + h / 2) * rows
                    and row + 1 > (y - h / 2) * rows
                    and column < (x + w / 2) * columns
                    and column + 1 > (x - w / 2) * columns
                ]
                for cell in cells:
                    areas[cell] = min(float(areas[cell]), len(cells))
            rest = areas.isinf() & ~hidden
            ins.append((1 / areas).flatten())
            outs.append((rest / max(1, int(rest.sum()))).flatten())
        inside.append(torch.cat(ins))
        outside.append(torch.cat(outs))
    return torch.stack(inside), torch.stack(outside)


def crowded() -> tuple[Targets, Tensor, Levels]:
    """Overlapping objects, an image without any, a tiny one, one at the border; two levels."""
    boxes = torch.zeros(3, 3, 4)
    boxes[0, :2] = torch.tensor([[0.41, 0.43, 0.62, 0.58], [0.37, 0.33, 0.21, 0.13]])
    boxes[2] = torch.tensor(
        [[0.531, 0.517, 1e-3, 1e-3], [0.91, 0.86, 0.17, 0.27], [0.13, 0.77, 0.2, 0.41]]
    )
    levels = ((8, 10), (4, 5))
    hidden = []
    for height, width in levels:
        level = torch.zeros(3, height, width, dtype=torch.bool)
        level[1, :, width // 2 :] = True
        level[2, 3 * height // 4 :] = True
        hidden.append(level.flatten(1))
    labels, counts = torch.zeros(3, 3, dtype=torch.long), (2, 0, 3)
    sizes, numbers = ((80, 100),) * 3, torch.tensor(counts)
    targets = Targets(labels, boxes, counts, (1, 2, 3), sizes, numbers)
    return targets, torch.cat(hidden, 1), levels


def test_shares_equal_loops() -> None:
    targets, padding, levels = crowded()
    found = object_shares(targets, padding, levels)
    for ours, expected in zip(found, shares_by_loops(targets, padding, levels), strict=True):
        torch.testing.assert_close(ours, expected)
    assert not found[0][padding].any() and not found[1][padding].any()


def test_an_object_counts_1_on_each_level_whatever_its_size() -> None:
    targets, padding, levels = crowded()
    found = object_shares(targets, padding, levels)[0].sum(1)
    # Two that do not overlap; a third that covers one of them would count less.
    assert found[1] == 0 and found[2].item() == pytest.approx(2 * 3)
    outside = object_shares(targets, padding, levels)[1].sum(1)
    torch.testing.assert_close(outside, torch.full((3,), 2.0))
    none = object_shares(without_objects(targets), None, levels)
    assert not none[0].any()
    torch.testing.assert_close(none[1].sum(1), torch.full((3,), 2.0))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["conditional_detr", "deformable_detr", "deformable-two-stage"])
def test_losses_equal_loops(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kind: str
) -> None:
    # No edge of an object is that of a cell: rounding would decide what it touches.
    targets = replace(targets, boxes_cxcywh=targets.boxes_cxcywh * 0.97)
    student, teacher = (
        tiny_detector(seed=seed, **FAMILY[kind], decoder_layers=layers)
        for seed, layers in ((1, 2), (0, 4))
    )
    found = losses(build(student, teacher), images, targets)
    memories = [part.encode(images) for part in (student, teacher)]
    memory = memories[0]
    assert memory.padding is not None
    inside, outside = shares_by_loops(targets, memory.padding, memory.levels)
    expected = {"memory/foreground": 0.0, "memory/background": 0.0}
    for image in range(3):
        for token in range(inside.shape[1]):
            ours, theirs = (part.tokens[image, token] for part in memories)
            distance = float((ours - theirs).square().sum())
            expected["memory/foreground"] += 5e-5 * float(inside[image, token]) * distance / 3
            expected["memory/background"] += 1e-7 * float(outside[image, token]) * distance / 3
    queries = TargetQueries(teacher.config.width, 4, 0)(
        targets, teacher.object_queries(memories[1])
    )
    [theirs] = teacher.decode(memories[1], [queries])
    [ours] = student.decode(memories[0], [queries])
    terms = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    for layer, other in ((0, 1), (1, 3)):
        at = [
            (image, query) for image, count in enumerate(targets.counts) for query in range(count)
        ]
        sure = {place: float(theirs.logits[other][place].sigmoid().max()) for place in at}
        for place, weight in sure.items():
            weight /= sum(sure.values())
            target = theirs.logits[other][place].softmax(0)
            difference = target.log() - ours.logits[layer][place].log_softmax(0)
            boxes = ours.boxes_cxcywh[layer][place], theirs.boxes_cxcywh[other][place]
            corners = [box_convert(box[None], "cxcywh", "xyxy") for box in boxes]
            terms["class"] += weight * float((target * difference).sum())
            terms["l1"] += weight * 5 * float((boxes[0] - boxes[1]).abs().sum())
            terms["giou"] += weight * 2 * (1 - float(generalized_box_iou(*corners)))
    expected |= {f"targets/{name}": value for name, value in terms.items()}
    for name, value in expected.items():
        assert value > 0
        assert found[name].item() == pytest.approx(value, rel=1e-4), name


def test_queries_are_at_their_objects_and_classes_differ(targets: Targets) -> None:
    generator = torch.Generator().manual_seed(0)
    own, content = (3 + 2 * torch.randn(2, 50, 512, generator=generator)).unbind(0)
    made = TargetQueries(512, 60, 0)
    boxes = made(targets, ObjectQueries(own, torch.zeros(50, 4), content))
    assert boxes.reference_logits is not None and boxes.content is not None
    placed = boxes.reference_logits.sigmoid()
    torch.testing.assert_close(placed[0, :2], targets.boxes_cxcywh[0])
    assert torch.allclose(placed[0, 2:], torch.tensor(0.5))
    assert made.used(targets).sum(1).tolist() == list(targets.counts)
    points = made(targets, ObjectQueries(own, torch.zeros(50, 2)))
    assert points.reference_logits is not None and points.content is None
    torch.testing.assert_close(points.reference_logits.sigmoid(), placed[..., :2])
    labels = torch.arange(60)[None]
    many = replace(
        targets,
        labels=labels,
        boxes_cxcywh=torch.full((1, 60, 4), 0.3),
        counts=(60,),
        num_objects=torch.tensor([60]),
    )
    classes = made(many, ObjectQueries(own, torch.zeros(50, 4), content)).content
    assert classes is not None
    assert classes.mean() == pytest.approx(3, abs=0.2) and classes.std() == pytest.approx(
        2, abs=0.2
    )
    alike = torch.corrcoef(classes[0]) - torch.eye(60)
    assert alike.abs().max() < 0.3
    few = TargetQueries(512, 5, 0)(many, ObjectQueries(own, torch.zeros(50, 4), content))
    assert few.content is not None
    torch.testing.assert_close(few.content, classes[:, :5])


def test_an_images_losses_depend_on_nothing_else_in_its_batch(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    module = build(tiny_detector(seed=1), tiny_detector())
    taught = module.run_teacher(images, targets=targets)
    sums = module.normalisers(targets, taught)
    whole = module(images, targets, taught, sums)
    assert images.padding is not None
    parts = []
    for image in range(3):
        alone = ImageBatch(images.pixels[[image]], images.padding[[image]])
        known = targets.of_images([image])
        slots = known.counts[0]
        known = replace(
            known, labels=known.labels[:, :slots], boxes_cxcywh=known.boxes_cxcywh[:, :slots]
        )
        parts.append(module(alone, known, module.run_teacher(alone, targets=known), sums))
    for name, loss in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), loss, msg=name)


@pytest.mark.parametrize("apart", [0, 1, 4])
@pytest.mark.parametrize("student", KINDS)
def test_every_detector_with_places_teaches_and_learns(
    tiny_detector: Build, images: ImageBatch, targets: Targets, student: str, apart: int
) -> None:
    """Also of other widths, with and without objects: the same parameters have gradients."""
    teacher = KINDS[(KINDS.index(student) + apart) % len(KINDS)]
    taught = tiny_detector(queries=8, width=64, **FAMILY[teacher])
    module = build(tiny_detector(seed=1, **FAMILY[student]).train(), taught)
    for batch in (targets, without_objects(targets)):
        found = losses(module, images, batch)
        distilled = {k for k in found if k.startswith(("memory/", "targets/"))}
        assert len(distilled) == 5
        assert all(torch.isfinite(loss) for loss in found.values())
        module.zero_grad(set_to_none=True)
        torch.stack([*found.values()]).sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(parameter.grad is None for parameter in taught.parameters())


def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    teacher = tiny_detector()
    with torch.no_grad():
        found = losses(build(tiny_detector(), teacher), images, targets)
    distilled = {k: x for k, x in found.items() if k.startswith(("memory", "targets"))}
    assert all(abs(loss.item()) < tolerance(name) for name, loss in distilled.items()), distilled


def test_what_is_off_costs_nothing(
    tiny_detector: Build, images: ImageBatch, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_detector()
    only = build(tiny_detector(seed=1), teacher, foreground_weight=0, background_weight=0)
    found = losses(only, images, targets)
    assert {k for k in found if k.startswith(("memory", "targets"))} == {
        "targets/class",
        "targets/l1",
        "targets/giou",
    }
    decoded = []
    decode = teacher.decode
    monkeypatch.setattr(
        teacher, "decode", lambda *given, **keys: decoded.append(1) or decode(*given, **keys)
    )
    config = MethodConfig.parse({"method": "clockdistill", "target_weight": 0})
    module = Distiller(tiny_detector(seed=1), teacher, config, SetCriterionConfig(), seed=0)
    found = losses(module, images, targets)
    assert "memory/foreground" in found and not any(k.startswith("targets") for k in found)
    assert not decoded


def test_what_does_not_fit_is_refused_with_a_way_out(tiny_detector: Build) -> None:
    for pair in (("detr", "conditional_detr"), ("conditional_detr", "detr")):
        student, teacher = (tiny_detector(**FAMILY[name]) for name in pair)
        with pytest.raises(UserError, match=r"\(detr\) have no place: set it to 0"):
            build(student, teacher)
        CLoCKDistill.check_compatible(
            MethodConfig.parse({"method": "clockdistill", "target_weight": 0}),
            student.config,
            teacher.config,
            3,
        )
    with pytest.raises(UserError, match="Set it to 'bce' or 'focal'"):
        build(tiny_detector(classes=1), tiny_detector(classes=1))
    build(tiny_detector(classes=1), tiny_detector(classes=1), class_loss="bce")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"foreground_weight": 0, "background_weight": 0, "target_weight": 0},
            "use method 'none'",
        ),
        (dict.fromkeys(("class_weight", "l1_weight", "giou_weight"), 0), "set target_weight to 0"),
        ({"target_weight": 0, "l1_weight": 3}, "remove l1_weight"),
        ({"target_weight": 0, "layer_map": "last"}, "remove layer_map"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        MethodConfig.parse({"method": "clockdistill"} | settings)
