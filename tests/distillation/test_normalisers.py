"""What pairs weighted by confidence are divided by, and what that does to gradients."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from d3etr.config.data import DigitScenesConfig, PreprocessingConfig
from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.data.digit_scenes.drawing import draw_scene, load_divided_digits
from d3etr.data.transforms import normalise
from d3etr.detectors.conditional_detr import ConditionalDETR
from d3etr.detectors.weights import load_weights
from d3etr.distiller import Distiller
from d3etr.losses.set_criterion import detection_problem, set_losses
from d3etr.matching.assignment import Solver
from d3etr.methods.pairs import FIXED, MatchedPairs, counted_confidence, pair_losses
from d3etr.structures import DecoderOutputs, ImageBatch, Targets

TEACHER = Path(__file__).parents[2] / "trainers" / "weights" / "digits-teacher.safetensors"
Build = Callable[..., ConditionalDETR]


def config(**settings: Any) -> Any:
    off = {"self_attention": {"weight": 0}, "cross_attention": {"weight": 0}}
    return MethodConfig.parse({"method": "d3etr", **off, **settings})


def losses(student: ConditionalDETR, teacher: ConditionalDETR, batch: Any, **settings: Any) -> Any:
    images, targets = batch
    module = Distiller(student, teacher, config(**settings), SetCriterionConfig(), seed=0)
    taught = module.run_teacher(images)
    return module(images, targets, taught, module.normalisers(targets, taught)), taught


def test_objects_are_divided_by_instead_of_confidence(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    batch, layer = (images, targets), {"decoder_layers": 1}
    pair = tiny_detector(seed=1, **layer), tiny_detector(**layer)
    by_confidence, taught = losses(*pair, batch)
    by_objects, _ = losses(*pair, batch, normaliser="objects")
    share = float(taught.main.confidence().sum() / targets.num_objects.sum())
    for name in ("adaptive/class", "fixed/l1", "fixed/giou"):
        assert float(by_objects[name]) == pytest.approx(share * float(by_confidence[name]))


def test_queries_below_the_minimum_weigh_nothing(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    """Against loops over layers, images and pairs."""
    student, teacher = tiny_detector(seed=1), tiny_detector()
    confidence = losses(student, teacher, (images, targets))[1].main.confidence()
    minimum = float(confidence.median())
    settings = {"minimum_confidence": minimum, "adaptive_ratio": 0}
    found, taught = losses(student, teacher, (images, targets), **settings)
    memory = student.encode(images)
    ours = student.decode(memory, [teacher.object_queries()])[0]
    expected = 0.0
    for layer in range(len(confidence)):
        total = max(1.0, sum(float(c) for c in confidence[layer].flatten() if c >= minimum))
        for image, query in torch.cartesian_prod(*(torch.arange(n) for n in confidence.shape[1:])):
            if confidence[layer, image, query] >= minimum:
                at = layer, image, query
                gap = (ours.boxes_cxcywh[at] - taught.main.boxes_cxcywh[at]).abs().sum()
                expected += float(confidence[at] * gap) / total
    assert found["fixed/l1"].item() == pytest.approx(2 * 5 * expected, rel=1e-4)


def test_a_batch_without_confident_queries_teaches_nothing_infinite(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    batch = images, targets
    found, _ = losses(tiny_detector(seed=1), tiny_detector(), batch, minimum_confidence=1.0)
    assert found["fixed/l1"] == 0 and found["adaptive/giou"] == 0
    assert 0 < found["fixed/class"] < 100


def test_what_counts_objects_learns_nothing_without_labels() -> None:
    assert config().learns_without_labels and config(minimum_confidence=0.1).learns_without_labels
    assert not config(normaliser="objects").learns_without_labels


def test_settings_without_effect_are_refused() -> None:
    uniform = {"pair_weights": "uniform", "class_pair_weights": "uniform"}
    no_boxes = {"class_pair_weights": "uniform", "l1_weight": 0.0, "giou_weight": 0.0}
    no_classes = {"class_weight": 0.0, "pair_weights": "uniform"}
    idle = {"weight": 0.0, "pair_weights": "confidence"}
    for setting in ({"normaliser": "objects"}, {"minimum_confidence": 0.1}):
        for prediction in (uniform, no_boxes, no_classes, {"weight": 0.0}):
            with pytest.raises(ValidationError, match="no term weights its pairs by confidence"):
                config(prediction=prediction, self_attention=idle, **setting)
    every = {"pair_weights": "uniform", "class_pair_weights": "every"}
    config(prediction=every, minimum_confidence=0.1)  # in what it is divided by
    config(prediction=every, normaliser="objects")
    for more in ({}, {"selection": {"weight": 1.0}}):
        with pytest.raises(ValidationError, match=r"minimum_confidence .* or is divided by it"):
            config(prediction=every, normaliser="objects", minimum_confidence=0.1, **more)


@torch.no_grad()
def taught_scenes(count: int) -> tuple[DecoderOutputs, DecoderOutputs, Targets]:
    """Outputs of the shipped teacher, and of one whose weights are disturbed, on digit scenes."""
    torch.manual_seed(0)
    teacher = load_weights(TEACHER)[0].eval()
    student = deepcopy(teacher)
    for parameter in student.parameters():
        if parameter.numel() > 1:
            parameter.add_(0.25 * parameter.std() * torch.randn_like(parameter))
    scenes, digits = DigitScenesConfig(), load_divided_digits()["validation"]
    drawn = [draw_scene(scenes, "validation", k, digits) for k in range(count)]
    settings = PreprocessingConfig(normalisation="per_image", shortest_side=None, longest_side=None)
    pixels = [normalise(torch.from_numpy(one.pixels).permute(2, 0, 1), settings) for one in drawn]
    images = ImageBatch(torch.stack(pixels))
    both = []
    for detector in (teacher, student):
        memory = detector.encode(images)
        both.append(detector.decode(memory, [detector.object_queries(memory)])[0])
    return both[0], both[1], objects_of(drawn, pixels[0].shape[-1])


def objects_of(scenes: list[Any], side: int) -> Targets:
    counts = tuple(len(scene.digits) for scene in scenes)
    labels = torch.zeros(len(scenes), max(counts), dtype=torch.long)
    boxes = torch.zeros(len(scenes), max(counts), 4)
    for image, scene in enumerate(scenes):
        corners = torch.as_tensor(scene.boxes_xyxy, dtype=torch.float32) / side
        labels[image, : counts[image]] = torch.tensor([digit.label for digit in scene.digits])
        centre, size = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        boxes[image, : counts[image]] = torch.cat([centre, size], 1)
    sizes = ((side, side),) * len(scenes)
    ids = tuple(range(len(scenes)))
    return Targets(labels, boxes, counts, ids, sizes, torch.tensor(counts))


def padded(outputs: DecoderOutputs, queries: int, seed: int) -> DecoderOutputs:
    """With further queries that found nothing: a confidence of about 0.04."""
    generator = torch.Generator().manual_seed(seed)
    layers, images, known, classes = outputs.logits.shape
    shape = layers, images, queries - known
    logits = -4.6 + 0.7 * torch.randn(*shape, classes, generator=generator)
    boxes = 0.2 + 0.5 * torch.rand(*shape, 4, generator=generator)
    return replace(
        outputs,
        logits=torch.cat([outputs.logits, logits], 2),
        boxes_cxcywh=torch.cat([outputs.boxes_cxcywh, boxes], 2),
    )


def gradient_shares(queries: int, settings: dict[str, Any]) -> dict[str, float]:
    """Norms of the gradients of L_fixed's terms by what the student's decoder says.

    Relative to that of the same term of the detection loss.
    """
    teacher, student, targets = taught_scenes(16)
    teacher, student = padded(teacher, queries, 1), padded(student, queries, 2)
    outputs = [student.logits.requires_grad_(), student.boxes_cxcywh.requires_grad_()]
    criterion, method = SetCriterionConfig(), config(**settings)
    problem = detection_problem("student", student, targets, criterion)
    assignment = Solver().start_named({"main": problem})()["main"]
    objects = targets.num_objects.sum().float()
    detection = set_losses(student, targets, assignment, objects, criterion)
    total = objects.expand(student.layers)
    if method.normaliser == "confidence":
        total = counted_confidence(teacher, method.minimum_confidence).sum((1, 2))
    pairs = MatchedPairs(student, teacher, FIXED, total, torch.tensor(16.0))
    distilled = pair_losses("fixed", 1.0, pairs, method)

    def norm(loss: Tensor) -> float:
        found = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
        return float(torch.cat([x.flatten() for x in found if x is not None]).norm())

    return {name: norm(distilled[f"fixed/{name}"]) / norm(detection[name]) for name in detection}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, (0.25, 0.4)),
        ({"normaliser": "objects"}, (0.9, 1.15)),
        ({"minimum_confidence": 0.2}, (0.9, 1.1)),
    ],
    ids=["confidence", "objects", "minimum"],
)
def test_what_300_queries_leave_of_the_gradient_at_40(
    settings: dict[str, Any], kept: tuple[float, float]
) -> None:
    """Divided by the total confidence, distillation shrinks beside detection.

    260 queries that found nothing add up to more confidence than the few that found something.
    """
    few, many = (gradient_shares(queries, settings) for queries in (40, 300))
    for term in ("class", "l1", "giou"):
        assert kept[0] < many[term] / few[term] < kept[1], term
