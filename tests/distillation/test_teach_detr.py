"""A teacher's boxes as one more set of objects (``teach_detr``)."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.matching.boxes import cxcywh_to_xyxy
from d3etr.structures import ImageBatch, Targets

Build = Callable[..., DetectionTransformer]


def _distiller(student: DetectionTransformer, **settings: object) -> Distiller:
    config = MethodConfig.parse({"method": "teach_detr"} | settings)
    return Distiller(student, None, config, SetCriterionConfig(), seed=0)


def _losses(module: Distiller, images: ImageBatch, targets: Targets) -> dict[str, Tensor]:
    taught = module.run_teacher(images)
    return module(images, targets, taught, module.normalisers(targets, taught))


def _with_boxes(targets: Targets, scores: Tensor) -> Targets:
    used = torch.arange(targets.labels.shape[1]) < targets.num_objects[:, None]
    return replace(targets, of_teacher=replace(targets, scores=scores * used))


def test_sure_boxes_that_are_the_objects_count_as_ground_truth(
    any_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student = any_detector(seed=1)
    if student.config.softmax_classes:
        pytest.skip("refused: scores are targets of single classes")
    module = _distiller(student)
    losses = _losses(module, images, _with_boxes(targets, torch.ones(3, 2)))
    for term in ("class", "l1", "giou"):
        truth, found = losses[f"detection/{term}"], losses[f"teacher_boxes/{term}"]
        if student.config.refines_distributions:  # what comes before learns from objects alone
            assert 0 < found < truth
            continue
        assert found.item() == pytest.approx(truth.item(), rel=1e-5)


def test_it_is_the_sum_over_matched_boxes_by_their_scores(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student = tiny_detector(seed=1)
    boxes = torch.rand(3, 2, 4) * 0.4 + 0.2
    moved = replace(targets, boxes_cxcywh=boxes)
    scores = torch.tensor([[0.9, 0.3], [0.0, 0.0], [0.6, 0.0]])
    both = replace(targets, of_teacher=replace(moved, scores=scores))
    module = _distiller(student, weight=1.5)
    losses = _losses(module, images, both)
    alone = _losses(module, images, replace(moved, of_teacher=both.of_teacher))
    # Matched as ground truth would be: the assignment is that of the same boxes as objects.
    memory = student.encode(images)
    [outputs] = student.decode(memory, [student.object_queries(memory)])
    from d3etr.losses.set_criterion import detection_problem

    problem = detection_problem("boxes", outputs, moved, SetCriterionConfig())
    assignment = module.solver.start_named({"x": problem})()["x"]
    expected = dict.fromkeys(("class", "l1", "giou"), 0.0)
    for layer in range(outputs.layers):
        for image, count in enumerate(targets.counts):
            matched = {}
            for pair in range(count):
                query = int(assignment.rows[layer, image, pair])
                matched[query] = int(assignment.columns[layer, image, pair])
            for query in range(outputs.queries):
                logits = outputs.logits[layer, image, query]
                for c, z in enumerate(logits.tolist()):
                    p = torch.tensor(z).sigmoid().item()
                    log_p = torch.nn.functional.logsigmoid(torch.tensor(z)).item()
                    log_not = torch.nn.functional.logsigmoid(torch.tensor(-z)).item()
                    column = matched.get(query)
                    if column is not None and int(moved.labels[image, column]) == c:
                        s = scores[image, column].item()
                        entropy = -(s * log_p + (1 - s) * log_not)
                        expected["class"] += 2 * 0.25 * abs(s - p) ** 2 * entropy
                    else:
                        expected["class"] += 2 * -0.75 * p**2 * log_not
                if query in matched:
                    s = scores[image, matched[query]].item()
                    own, other = outputs.boxes_cxcywh[layer, image, query], boxes[image]
                    other = other[matched[query]]
                    corners = [cxcywh_to_xyxy(b[None]) for b in (own, other)]
                    expected["l1"] += 5 * s * (own - other).abs().sum().item()
                    overlap = generalized_box_iou(*corners).item()
                    expected["giou"] += 2 * s * (1 - overlap)
    for term, value in expected.items():
        wanted = 1.5 * value / scores.sum().item()
        assert losses[f"teacher_boxes/{term}"].item() == pytest.approx(wanted, rel=1e-4), term
        # What the ground truth is changes nothing of it.
        assert alone[f"teacher_boxes/{term}"].item() == losses[f"teacher_boxes/{term}"].item()


def test_images_without_boxes_say_that_nothing_is_there(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    nothing = Targets(
        torch.zeros(3, 0, dtype=torch.int64),
        torch.zeros(3, 0, 4),
        (0, 0, 0),
        targets.image_ids,
        targets.original_sizes,
        torch.zeros(3, dtype=torch.int64),
        scores=torch.zeros(3, 0),
    )
    losses = _losses(_distiller(tiny_detector()), images, replace(targets, of_teacher=nothing))
    assert losses["teacher_boxes/class"] > 0
    assert losses["teacher_boxes/l1"] == losses["teacher_boxes/giou"] == 0


def test_the_class_term_is_least_where_the_probability_is_the_score() -> None:
    logits = torch.tensor(0.3).logit().requires_grad_(True)
    distance = (0.3 - logits.sigmoid()).abs() ** 2
    loss = distance * torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.tensor(0.3)
    )
    loss.backward()
    assert loss.item() == pytest.approx(0) and logits.grad == pytest.approx(0)
