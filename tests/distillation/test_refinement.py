"""TPRD's step against a loop over layers, images and queries, and what learns from it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.errors import UserError
from d3etr.losses.set_criterion import detection_problem
from d3etr.matching.assignment import assign
from d3etr.matching.boxes import cxcywh_to_xyxy, iou
from d3etr.matching.costs import detection_costs
from d3etr.methods.refinement import TeacherRefinement
from d3etr.structures import DecoderOutputs, ImageBatch, Targets

Build = Callable[..., DetectionTransformer]
LAYERS, QUERIES, CLASSES = 4, 12, 3
REFINED: dict[str, dict[str, Any]] = {
    "d3etr": {"method": "d3etr"},
    "kd_detr": {"method": "kd_detr", "general_points": {"count": 4}, "layer_map": "uniform"},
    "detrdistill": {"method": "detrdistill"},
    "qskd": {"method": "qskd"},
}


def outputs_near(targets: Targets, seed: int = 0, layers: int = LAYERS) -> DecoderOutputs:
    """Of a decoder that finds objects in some layers better than in others."""
    generator = torch.Generator().manual_seed(seed)
    shape = layers, len(targets.counts), QUERIES
    boxes = 0.2 + 0.6 * torch.rand(*shape, 4, generator=generator)
    for image, count in enumerate(targets.counts):
        for query in range(2 * count):
            noise = 1 + 0.3 * torch.randn(layers, 4, generator=generator)
            truth = targets.boxes_cxcywh[image, query % count]
            boxes[:, image, query] = (truth * noise).clamp(0.02, 0.98)
    return DecoderOutputs(torch.randn(*shape, CLASSES, generator=generator), boxes)


def refined_by_loops(
    outputs: DecoderOutputs, targets: Targets, layers: list[int]
) -> tuple[Tensor, Tensor, int, int]:
    """Logits, boxes, and how many queries with and without an object changed."""
    logits, boxes = outputs.logits.clone(), outputs.boxes_cxcywh.clone()
    costs = detection_costs(outputs, targets, SetCriterionConfig())
    corners = box_convert(outputs.boxes_cxcywh, "cxcywh", "xyxy")
    truth = box_convert(targets.boxes_cxcywh, "cxcywh", "xyxy")
    found, lowered = 0, 0
    for layer in range(outputs.layers):
        earlier = [other for other in range(outputs.layers) if layers[other] < layers[layer]]
        for image, count in enumerate(targets.counts):
            if not count:
                continue
            rows, columns = linear_sum_assignment(costs[layer, image, :, :count])
            of_query = dict(zip(rows.tolist(), columns.tolist(), strict=True))
            for query in range(outputs.queries):
                scores = outputs.logits[:, image, query]
                if query in of_query:
                    target = truth[image, of_query[query]][None]
                    label = int(targets.labels[image, of_query[query]])
                    overlap = box_iou(corners[:, image, query], target)[:, 0]
                    better = [
                        other
                        for other in earlier
                        if overlap[other] > overlap[layer]
                        and scores[other, label] > scores[layer, label]
                    ]
                    if better:
                        best = max(better, key=lambda other: float(overlap[other]))
                        boxes[layer, image, query] = outputs.boxes_cxcywh[best, image, query]
                        logits[layer, image, query, label] = scores[best, label]
                        found += 1
                else:
                    own = int(scores[layer].argmax())
                    lower = [
                        float(scores[other, own])
                        for other in earlier
                        if int(scores[other].argmax()) == own
                        and scores[other, own] < scores[layer, own]
                    ]
                    if lower:
                        logits[layer, image, query, own] = min(lower)
                        lowered += 1
    return logits, boxes, found, lowered


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [1, 3, 3, 5], [4, 0, 2, 5]])
def test_outputs_equal_loops(targets: Targets, layers: list[int]) -> None:
    # The second image has no objects.
    found, lowered = 0, 0
    for seed in range(20):
        outputs = outputs_near(targets, seed)
        problem = detection_problem("teacher", outputs, targets, SetCriterionConfig())
        refined = TeacherRefinement(layers)(outputs, targets, *assign([problem]))
        logits, boxes, *counts = refined_by_loops(outputs, targets, layers)
        assert torch.equal(refined.logits, logits)
        assert torch.equal(refined.boxes_cxcywh, boxes)
        assert torch.equal(refined.logits[:, 1], outputs.logits[:, 1])
        found, lowered = found + counts[0], lowered + counts[1]
    assert found > 10 and lowered > 100


def test_iou_equals_torchvisions() -> None:
    boxes = torch.rand(2, 50, 4, generator=torch.Generator().manual_seed(0))
    first, second = cxcywh_to_xyxy(boxes)
    torch.testing.assert_close(iou(first[:, None], second[None]), box_iou(first, second))
    assert float(iou(torch.zeros(4), torch.zeros(4))) == 0


def test_a_batch_without_objects_is_left_as_it_is(targets: Targets) -> None:
    none = replace(
        targets,
        labels=targets.labels[:, :0],
        boxes_cxcywh=targets.boxes_cxcywh[:, :0],
        counts=(0, 0, 0),
        num_objects=torch.zeros(3, dtype=torch.long),
    )
    outputs = outputs_near(none)
    problem = detection_problem("teacher", outputs, none, SetCriterionConfig())
    refined = TeacherRefinement(range(LAYERS))(outputs, none, *assign([problem]))
    assert torch.equal(refined.logits, outputs.logits)


def build(student: DetectionTransformer, teacher: DetectionTransformer, **keys: Any) -> Distiller:
    return Distiller(student, teacher, MethodConfig.parse(keys), SetCriterionConfig(), seed=0)


@pytest.mark.parametrize("method", REFINED)
@pytest.mark.parametrize("kind", ["conditional_detr", "deformable_detr"])
def test_every_method_compares_what_is_refined(
    tiny_detector: Build,
    images: ImageBatch,
    targets: Targets,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    method: str,
) -> None:
    """Its losses are those of a teacher that gives the refined outputs by itself."""
    student = tiny_detector(seed=1, name=kind, decoder_layers=3)
    teacher = tiny_detector(name=kind, queries=QUERIES, decoder_layers=5)
    decode, near = teacher.decode, outputs_near(targets, layers=5)

    def trained(*given: Any, **keys: Any) -> list[DecoderOutputs]:
        main, *others = decode(*given, **keys)
        return [replace(main, logits=near.logits, boxes_cxcywh=near.boxes_cxcywh), *others]

    monkeypatch.setattr(teacher, "decode", trained)
    refining = build(student, teacher, **REFINED[method], refine_teacher=True)
    plain = build(student, teacher, **REFINED[method])
    refining.method.load_state_dict(plain.method.state_dict())
    taught = plain.run_teacher(images)
    refined = refining.run_teacher(images, targets=targets)
    assert taught is not None and refined is not None
    logits, boxes, *changed = refined_by_loops(taught.main, targets, plain.method.layers)
    assert sum(changed) > 3
    assert torch.equal(refined.main.logits, logits)
    assert torch.equal(refined.main.boxes_cxcywh, boxes)
    main = replace(taught.main, logits=logits, boxes_cxcywh=boxes)
    groups = {**taught.groups, "detection": replace(taught.groups["detection"], outputs=main)}
    taught = plain.method.select(replace(taught, groups=groups))
    found, expected = (
        module(images, targets, part, module.normalisers(targets, part))
        for module, part in ((refining, refined), (plain, taught))
    )
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, msg=name)


def test_without_ground_truth_nothing_is_refined_silently(
    tiny_detector: Build, images: ImageBatch
) -> None:
    module = build(tiny_detector(seed=1), tiny_detector(), method="d3etr", refine_teacher=True)
    with pytest.raises(ValueError, match="ground truth"):
        module.run_teacher(images)


@pytest.mark.parametrize("method", ["d3etr", "kd_detr", "detrdistill", "qskd"])
def test_what_cannot_be_refined_is_refused_with_a_way_out(
    tiny_detector: Build, method: str
) -> None:
    keys = {"method": method, "refine_teacher": True}
    with pytest.raises(UserError, match=r"layer_map to 'uniform'"):
        build(tiny_detector(seed=1), tiny_detector(), **keys, layer_map="last")
    with pytest.raises(UserError, match="more than one decoder layer"):
        build(tiny_detector(decoder_layers=1), tiny_detector(), **keys, layer_map="uniform")
    softmax = tiny_detector(name="detr", classification="softmax")
    with pytest.raises(UserError, match="sigmoid"):
        build(tiny_detector(seed=1), softmax, **keys, layer_map="uniform")


def test_a_switch_without_effect_is_refused() -> None:
    off = {"prediction": {"weight": 0.0}}
    with pytest.raises(ValidationError, match=r"refine_teacher has no effect: prediction\.weight"):
        MethodConfig.parse({"method": "d3etr", "refine_teacher": True, **off})
    with pytest.raises(ValidationError, match="has no effect on method 'feature_cosine'"):
        MethodConfig.parse({"method": "feature_cosine", "refine_teacher": True})
