"""Box distributions: losses against loops, identities, first boxes, and what is refused."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from scipy.optimize import linear_sum_assignment
from test_distiller_identities import distiller, losses_in_pieces, losses_of
from test_mixed_batches import mixed
from tiny import FAMILY
from torch import Tensor

from d3etr.config.distillation import MethodConfig, method_config
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.edge_distributions import BoxDistributions
from d3etr.errors import UserError
from d3etr.matching.boxes import cxcywh_to_xyxy, iou
from d3etr.matching.costs import detection_costs
from d3etr.matching.edges import mean_distances, moved_edges
from d3etr.methods.stored import StoredParts, outputs_to_store
from d3etr.structures import DecoderOutputs, ImageBatch, ObjectQueries, StoredOutputs, Targets

Build = Callable[..., DetectionTransformer]
OFF = {"weight": 0.0}
ONLY_EDGES = {"prediction": OFF}


def build(make: Build, seed: int = 0, **changes: Any) -> DetectionTransformer:
    return make(seed, **(FAMILY["d_fine"] | changes))


def taught(student: DetectionTransformer, teacher: DetectionTransformer, **keys: Any) -> Distiller:
    return distiller(student, teacher, **({"method": "distribution"} | keys))


def overlap(first: Tensor, second: Tensor) -> float:
    return float(iou(cxcywh_to_xyxy(first), cxcywh_to_xyxy(second)))


def divergence(ours: Tensor, theirs: Tensor, temperature: float) -> float:
    """T^2 KL of one edge, logits [K] each."""
    p, q = ((x / temperature).softmax(0).tolist() for x in (theirs, ours))
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def by_loops(
    ours: DecoderOutputs, theirs: DecoderOutputs, targets: Targets, temperature: float
) -> float:
    """The divergence of a group's distributions, unweighted."""
    costs = detection_costs(theirs, targets, SetCriterionConfig())
    matched = sum(targets.counts)
    others = len(targets.counts) * theirs.queries - matched
    share = math.sqrt(matched) / (math.sqrt(matched) + math.sqrt(others))
    assert ours.distributions is not None and theirs.distributions is not None
    total = 0.0
    for layer in range(ours.layers):
        for image, count in enumerate(targets.counts):
            rows, columns = linear_sum_assignment(costs[layer, image][:, :count])
            found = dict(zip(rows.tolist(), columns.tolist(), strict=True))
            for query in range(theirs.queries):
                at = layer, image, query
                mean = sum(
                    divergence(
                        ours.distributions.corners[(*at, edge)],
                        theirs.distributions.corners[(*at, edge)],
                        temperature,
                    )
                    for edge in range(4)
                )
                if query in found:
                    box = targets.boxes_cxcywh[image, found[query]]
                    weight = share * overlap(theirs.boxes_cxcywh[at], box) / matched
                else:
                    weight = (1 - share) * float(theirs.logits[at].max().sigmoid()) / others
                total += weight * mean / 4
    return total


@contextmanager
def seen_outputs(module: Distiller) -> Iterator[dict[str, Any]]:
    """What the student and the teacher said of the next batch."""
    seen: dict[str, Any] = {}
    real = module.method.losses

    def losses(student: Any, teacher: Any, *rest: Any) -> Any:
        seen.update(student=student, teacher=teacher)
        return real(student, teacher, *rest)

    module.method.losses = losses  # type: ignore[method-assign]
    yield seen
    module.method.losses = real  # type: ignore[method-assign]


@torch.no_grad()
@pytest.mark.parametrize(
    "keys", [{}, {"teacher_query_ratio": 0.5}, {"temperature": 2.0, "layer_map": "last"}]
)
def test_the_divergence_equals_loops(
    keys: dict[str, Any], tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student = build(tiny_detector, 1, width=48)
    teacher = build(tiny_detector, queries=8, decoder_layers=3)
    module = taught(student, teacher, adaptive_ratio=0.25, **keys)
    with seen_outputs(module) as seen:
        losses = losses_of(module, images, targets)
    ours = seen["student"].groups["auxiliary"]
    theirs = seen["teacher"].groups["auxiliary"].outputs
    assert ours.layers == theirs.layers == 2
    assert theirs.queries == (4 if "teacher_query_ratio" in keys else 8)
    expected = by_loops(ours, theirs, targets, keys.get("temperature", 5.0))
    assert losses["distribution/kl"].item() == pytest.approx(0.75 * 3.0 * expected, rel=1e-4)
    assert expected > 1e-3


def edge_terms(edges: BoxDistributions, at: tuple[int, int, int], box: Tensor) -> float:
    """Cross entropy of a query's four edges with the bins around those of a box."""
    layer, image, query = at
    cx, cy, w, h = edges.start[image, query].tolist()
    x, y, bw, bh = box.tolist()
    outwards = [
        ((cx - w / 2) - (x - bw / 2), w),
        ((cy - h / 2) - (y - bh / 2), h),
        ((x + bw / 2) - (cx + w / 2), w),
        ((y + bh / 2) - (cy + h / 2), h),
    ]
    bins, total = edges.distances.tolist(), 0.0
    for edge, (move, side) in enumerate(outwards):
        distance = min(max(move / side * edges.curvature, bins[0]), bins[-1])
        right = next(k for k in range(1, len(bins)) if distance <= bins[k])
        share = (distance - bins[right - 1]) / (bins[right] - bins[right - 1])
        log = edges.corners[layer, image, query, edge].log_softmax(0).tolist()
        total -= (1 - share) * log[right - 1] + share * log[right]
    return total


@torch.no_grad()
@pytest.mark.parametrize("keys", [{"adaptive_ratio": 1.0}, {"inherited_ratio": 1.0}])
def test_edges_over_pairs_equal_loops(
    keys: dict[str, Any], tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    """Whatever the teacher's own bins are."""
    student = build(tiny_detector, 1)
    teacher = build(tiny_detector, 2, queries=8, bins=12, bound=0.8, curvature=3.0)
    with torch.no_grad():  # boxes that overlap the teacher's
        student.proposals.load_state_dict(teacher.proposals.state_dict())  # type: ignore[union-attr]
    module = taught(student, teacher, **keys)
    pairs: list[Any] = []
    real = module.method.pair_terms

    def remembered(name: str, weight: float, found: Any) -> Any:
        pairs.append(found)
        return real(name, weight, found)

    module.method.pair_terms = remembered  # type: ignore[method-assign]
    losses = losses_of(module, images, targets)
    [found] = pairs
    name = next(iter(keys)).removesuffix("_ratio")
    ours, theirs = found.student, found.teacher
    confidence = theirs.confidence()
    expected = 0.0
    for layer in range(ours.layers):
        best = confidence[layer].topk(6, dim=1).values.sum()
        for image in range(3):
            columns = found.index.teacher[layer, image].tolist()
            weights = confidence[layer, image, columns]
            weights = weights / weights.sum() * confidence[layer, image].topk(6).values.sum()
            for row, column in enumerate(columns):
                box = theirs.boxes_cxcywh[layer, image, column]
                at = layer, image, row
                weight = overlap(ours.boxes_cxcywh[at], box) * float(weights[row] / best)
                expected += weight * edge_terms(ours.distributions, at, box)
    assert losses[f"{name}/edges"].item() == pytest.approx(0.3 * expected, rel=1e-4)
    assert expected > 1e-3


def test_a_student_that_is_its_teacher_has_nothing_to_learn_over_the_group(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    teacher = build(tiny_detector)
    module = taught(copy.deepcopy(teacher), teacher, adaptive_ratio=0.0)
    losses = losses_of(module, images, targets)
    for name in ("distribution/kl", "fixed/class"):
        assert abs(losses[name].item()) < 1e-6
    (losses["distribution/kl"] + losses["fixed/class"]).backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


@torch.no_grad()
def test_only_the_group_moves_the_edges_of_the_teachers_first_boxes(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    module = taught(build(tiny_detector, 1), build(tiny_detector))
    with seen_outputs(module) as seen:
        losses_of(module, images, targets)
    group, main = (seen["student"].groups[name] for name in ("auxiliary", "detection"))
    theirs = seen["teacher"].groups["auxiliary"].outputs.distributions
    edges = group.distributions
    assert torch.equal(edges.start, theirs.start)
    assert not torch.allclose(edges.first_boxes, theirs.start, atol=1e-3)
    assert torch.equal(main.distributions.start, main.distributions.first_boxes)
    moves = mean_distances(edges.corners, edges.distances)
    torch.testing.assert_close(group.boxes_cxcywh, moved_edges(edges.start, moves, edges.curvature))


@torch.no_grad()
def test_a_start_that_is_the_detectors_own_changes_nothing(
    tiny_detector: Build, images: ImageBatch
) -> None:
    detector = build(tiny_detector)
    memory = detector.encode(images)
    queries = detector.object_queries(memory)
    [alone] = detector.decode(memory, [queries])
    assert alone.distributions is not None
    given = replace(queries.map(lambda x: x), place=queries.place, grids=queries.grids)
    given = replace(given, start=alone.distributions.start)
    both = detector.decode(memory, [queries, given, queries])
    for outputs in both:
        torch.testing.assert_close(outputs.boxes_cxcywh, alone.boxes_cxcywh)
        torch.testing.assert_close(outputs.logits, alone.logits)
    moved = replace(given, start=alone.distributions.start * 0.9)
    main, other = detector.decode(memory, [queries, moved])
    torch.testing.assert_close(main.boxes_cxcywh, alone.boxes_cxcywh)
    assert not torch.allclose(other.boxes_cxcywh, alone.boxes_cxcywh, atol=1e-3)


def test_a_shifted_distribution_goes_back_towards_the_teachers(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    teacher = build(tiny_detector)
    student = copy.deepcopy(teacher)
    bias = student.decoder.box_heads[-1].layers[-1].bias  # type: ignore[union-attr,index]
    assert isinstance(bias, Tensor)
    shift = torch.linspace(-1, 1, 9).repeat(4)  # towards the outermost bins
    with torch.no_grad():
        bias += shift
    module = taught(student, teacher, adaptive_ratio=0.0, prediction=OFF)
    before = losses_of(module, images, targets)["distribution/kl"]
    before.backward()
    gradient = bias.grad
    assert gradient is not None
    assert torch.cosine_similarity(gradient, shift, 0) > 0.8
    with torch.no_grad():
        bias -= 0.1 * gradient / gradient.norm()
    assert losses_of(module, images, targets)["distribution/kl"] < before


def test_edges_of_pairs_go_towards_the_teachers(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    teacher = build(tiny_detector)
    student = copy.deepcopy(teacher)
    heads = student.decoder.box_heads  # type: ignore[union-attr]
    with torch.no_grad():
        heads[0].layers[-1].bias += torch.linspace(-2, 2, 9).repeat(4)  # type: ignore[index,operator,union-attr]
    module = taught(student, teacher, adaptive_ratio=1.0, prediction=OFF)
    parameters = [*heads.parameters()]  # type: ignore[union-attr,operator]
    optimiser = torch.optim.Adam(parameters, 0.02)

    def distance() -> float:
        with torch.no_grad():
            memory = student.encode(images)
            [ours] = student.decode(memory, [student.object_queries(memory)])
            theirs = module.run_teacher(images).main  # type: ignore[union-attr]
        return float((ours.boxes_cxcywh - theirs.boxes_cxcywh).abs().sum())

    before = distance()
    for _ in range(30):
        optimiser.zero_grad()
        losses_of(module, images, targets)["adaptive/edges"].backward()
        optimiser.step()
    assert distance() < 0.7 * before


@torch.no_grad()
def test_order_of_the_teachers_queries_changes_nothing(
    tiny_detector: Build, images: ImageBatch, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = build(tiny_detector, 1), build(tiny_detector)
    module = taught(student, teacher)
    first = losses_of(module, images, targets)
    order, real = torch.tensor([3, 0, 5, 1, 4, 2]), teacher.object_queries

    def permuted(memory: Any = None) -> ObjectQueries:
        queries = real(memory)
        moved = queries.map(lambda x: x[:, order])
        return replace(moved, place=queries.place[:, order], grids=queries.grids)  # type: ignore[index]

    monkeypatch.setattr(teacher, "object_queries", permuted)
    second = losses_of(module, images, targets)
    kinds = {"fixed", "distribution", "adaptive"}
    names = [name for name in first if name.partition("/")[0] in kinds]
    assert {name.partition("/")[0] for name in names} == kinds
    for name in names:
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "keys", [{}, {"teacher_query_ratio": 0.5}, {"inherited_ratio": 0.5}, {"every_steps": 2}]
)
def test_micro_batches_add_up_and_images_without_labels_teach(
    keys: dict[str, Any], tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    module = taught(build(tiny_detector, 1, denoising={"queries": 0}), build(tiny_detector), **keys)
    whole = losses_of(module, images, targets)
    parts = losses_in_pieces(module, images, targets)
    for name, loss in whole.items():
        total = sum(part[name].item() for part in parts)
        assert total == pytest.approx(loss.item(), rel=1e-4, abs=1e-6), name
    known, unknown = (losses_of(module, images, t) for t in (targets, mixed(targets)))
    assert unknown.keys() == known.keys()
    assert unknown["adaptive/edges"] == known["adaptive/edges"]
    assert unknown["distribution/kl"] != known["distribution/kl"]
    assert method_config(method="distribution").learns_without_labels


@pytest.mark.parametrize("slots", [0, 2])
def test_a_batch_without_objects_teaches(
    slots: int, tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    empty = replace(
        targets,
        labels=targets.labels[:, :slots],
        boxes_cxcywh=targets.boxes_cxcywh[:, :slots],
        counts=(0, 0, 0),
        num_objects=torch.zeros_like(targets.num_objects),
    )
    module = taught(build(tiny_detector, 1).train(), build(tiny_detector))
    losses = losses_of(module, images, empty)
    assert losses["distribution/kl"] > 0
    torch.stack([*losses.values()]).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_terms_are_those_that_are_on(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student, teacher = build(tiny_detector, 1), build(tiny_detector)
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({}, {"fixed/class", "distribution/kl", "adaptive/class", "adaptive/edges"}),
        (ONLY_EDGES, {"distribution/kl", "adaptive/edges"}),
        ({"adaptive_ratio": 0.0, "prediction": OFF}, {"distribution/kl"}),
        ({"adaptive_ratio": 1.0}, {"adaptive/class", "adaptive/edges"}),
        ({"edge_weight": 0}, {"fixed/class", "distribution/kl", "adaptive/class"}),
        ({"distribution_weight": 0}, {"fixed/class", "adaptive/class", "adaptive/edges"}),
        ({"inherited_ratio": 1.0}, {"inherited/class", "inherited/edges"}),
        (
            {"inherited_ratio": 1.0, "auxiliary_group": {"always": True}},
            {"inherited/class", "inherited/edges"},
        ),
    ]
    for keys, terms in cases:
        losses = losses_of(taught(student, teacher, **keys), images, targets)
        kinds = ("fixed", "distribution", "adaptive", "inherited")
        assert {name for name in losses if name.startswith(kinds)} == terms, keys


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"distribution_weight": 0, "edge_weight": 0}, "use method 'd3etr'"),
        ({"adaptive_ratio": 0.0, "distribution_weight": 0}, "use method 'd3etr'"),
        ({"adaptive_ratio": 1.0, "distribution_weight": 2.0}, "remove distribution_weight"),
        ({"inherited_ratio": 1.0, "temperature": 2.0}, "remove temperature"),
        ({"distribution_weight": 0, "temperature": 2.0}, "remove temperature"),
        ({"adaptive_ratio": 0.0, "edge_weight": 1.0}, "remove edge_weight"),
        ({"edge_weight": 0, "prediction": OFF}, "over adaptive or inherited pairs"),
        ({"distribution_weight": 0, "prediction": OFF}, "over the teacher's queries"),
        ({"refine_teacher": True}, "leaves its distributions"),
        ({"general_points": {"count": 3}}, "no pairs of this method"),
        ({"auxiliary_group": {"queries": "random", "assignment": "own"}}, "use method 'd3etr'"),
    ],
)
def test_settings_without_effect_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MethodConfig.parse({"method": "distribution", **keys})


def test_confidence_counts_without_predictions(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student, teacher = build(tiny_detector, 1), build(tiny_detector)
    student.proposals.load_state_dict(teacher.proposals.state_dict())  # type: ignore[union-attr]
    every, none = (
        losses_of(taught(student, teacher, minimum_confidence=least, **ONLY_EDGES), images, targets)
        for least in (0.0, 0.999)
    )
    assert every["adaptive/edges"] > 0 and none["adaptive/edges"] == 0
    assert every["distribution/kl"] > none["distribution/kl"] > 0  # matched ones weigh their IoU


def test_detectors_without_distributions_are_refused(tiny_detector: Build) -> None:
    edges, plain = build(tiny_detector), tiny_detector(**FAMILY["rt_detr"])
    for whose, pair in (("student", (plain, edges)), ("teacher", (edges, plain))):
        with pytest.raises(UserError, match=rf"the {whose} \(rt_detr\) has none: use 'd_fine'"):
            taught(*pair)
    config = method_config(method="distribution")
    assert config.student_problem(edges.config) is None
    assert "the student (rt_detr) has none" in str(config.student_problem(plain.config))


def test_other_bins_are_refused_with_what_helps(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student, teacher = build(tiny_detector, bins=8, curvature=2.0), build(tiny_detector, bins=12)
    helps = (
        r"bins 8 and 12, curvature 2 and 4\): set student.detector.bins to 12 and "
        r"student.detector.curvature to 4, or distillation.adaptive_ratio to 1"
    )
    with pytest.raises(UserError, match=helps):
        taught(student, teacher)
    losses = losses_of(taught(student, teacher, adaptive_ratio=1.0), images, targets)
    assert losses["adaptive/edges"].isfinite()


@torch.no_grad()
@pytest.mark.parametrize("kept", [None, 5])
def test_stored_distributions_are_the_teachers(
    kept: int | None, tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student, teacher = build(tiny_detector, 1), build(tiny_detector, queries=8, decoder_layers=4)
    module = taught(student, teacher, teacher_query_ratio=0.5)
    parts = StoredParts.of(module.method, kept)
    assert parts.distributions and parts.layers == (1, 3)
    stored = StoredOutputs(*outputs_to_store(teacher, images, parts))
    again = module.run_teacher(replace(images, stored=stored))
    running = module.run_teacher(images)
    assert again is not None and running is not None
    for name in ("detection", "auxiliary"):
        found, expected = (x.groups[name].outputs.distributions for x in (again, running))
        assert found is not None and expected is not None
        if kept is None or name == "auxiliary":  # half of those that are stored, the best first
            count = found.start.shape[1]
            assert torch.equal(found.corners, expected.corners[:, :, :count])
            assert torch.equal(found.start, expected.start[:, :count])
        assert torch.equal(found.distances, expected.distances)
        assert found.curvature == expected.curvature
    if kept is None:
        losses = (
            module(images, targets, x, module.normalisers(targets, x)) for x in (again, running)
        )
        first, second = losses
        assert first["distribution/kl"] > 0
        for name, loss in second.items():
            torch.testing.assert_close(first[name], loss, msg=name)
