"""Inherited Matching: query i of the student against query i of the teacher, which it began as."""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from test_distiller_identities import (
    DISTILLATION_TERMS,
    Build,
    distiller,
    losses_in_pieces,
    losses_of,
    tolerance,
)
from tiny import FAMILY, tiny_detector_config
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from d3etr.detectors.base import DetectionTransformer
from d3etr.errors import UserError
from d3etr.matching.assignment import CostBlock, Solver
from d3etr.methods.base import StudentOutputs
from d3etr.methods.d3etr import D3ETR
from d3etr.methods.inherited import same_place_first
from d3etr.structures import ImageBatch, Targets

ONE_STAGE = [
    kind
    for kind, settings in FAMILY.items()
    if not tiny_detector_config(**{"width": 32, **settings}).queries_need_images
]
Pair = Callable[..., tuple[DetectionTransformer, DetectionTransformer]]


@pytest.fixture(params=ONE_STAGE)
def pair(request: pytest.FixtureRequest, tiny_detector: Build) -> Pair:
    """Student and teacher of one kind."""
    kind = FAMILY[request.param]
    return lambda **changes: (
        tiny_detector(seed=1, **kind | changes),
        tiny_detector(**kind),
    )


def over(pairs: str, losses: dict[str, Tensor]) -> dict[str, float]:
    """The losses over one kind of pairs, by term."""
    named = ((name.split("/"), loss.item()) for name, loss in losses.items())
    return {term: loss for (prefix, term), loss in named if prefix == pairs}


def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    pair: Pair, images: ImageBatch, targets: Targets
) -> None:
    _, teacher = pair()
    module = distiller(copy.deepcopy(teacher), teacher, inherited_ratio=1.0)
    found = over("inherited", losses_of(module, images, targets))
    assert set(found) == DISTILLATION_TERMS
    assert all(abs(loss) < tolerance(name) for name, loss in found.items()), found


def test_at_a_ratio_of_one_nothing_else_is_decoded_or_matched(
    pair: Pair, images: ImageBatch, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair()
    module = distiller(student, teacher, inherited_ratio=1.0)
    decoded: list[int] = []
    decode = student.decode

    def spy(memory: Any, groups: Any, **options: Any) -> Any:
        decoded.append(len(groups))
        return decode(memory, groups, **options)

    monkeypatch.setattr(student, "decode", spy)
    found = losses_of(module, images, targets)
    assert decoded == [1]
    assert {name.split("/")[0] for name in found} == {"detection", "inherited"}
    taught = module.run_teacher(images)
    assert module.method.student_groups(taught, targets, 0) == {}
    assert all(loss.item() > 1e-4 for loss in found.values()), found
    assert set(module.state_dict()) == {f"student.{name}" for name in student.state_dict()}


def test_pairs_are_those_of_a_slow_loop(pair: Pair, images: ImageBatch, targets: Targets) -> None:
    student, teacher = pair()
    module = distiller(student, teacher, inherited_ratio=1.0)
    found = over("inherited", losses_of(module, images, targets))
    taught = module.run_teacher(images)
    assert taught is not None
    memory = student.encode(images)
    [ours] = student.decode(memory, [student.object_queries(memory)], attention=True)
    theirs = taught.main
    expected = dict.fromkeys(("l1", "giou", "cross_attention"), 0.0)
    for layer in range(ours.layers):
        confidence = theirs.logits[layer].amax(-1).sigmoid()
        for image in range(3):
            for query in range(ours.queries):
                share = (confidence[image, query] / confidence.sum()).item()
                boxes = [part.boxes_cxcywh[layer, image, query] for part in (ours, theirs)]
                corners = [box_convert(box[None], "cxcywh", "xyxy") for box in boxes]
                expected["l1"] += 2 * 5 * share * (boxes[0] - boxes[1]).abs().sum().item()
                giou = generalized_box_iou(*corners).item()
                expected["giou"] += 2 * 2 * share * (1 - giou)
                rows = [part.cross_attention[layer, image, :, query] for part in (ours, theirs)]
                divergence = torch.special.xlogy(rows[1], rows[1] / rows[0]).nan_to_num()
                each = divergence.sum(-1).mean().item() / (3 * ours.queries * ours.layers)
                expected["cross_attention"] += 2 * each
    for term, loss in expected.items():
        assert found[term] == pytest.approx(loss, rel=1e-4), term


def test_the_three_matchings_are_mixed_by_their_ratios(
    pair: Pair, images: ImageBatch, targets: Targets
) -> None:
    student, teacher = pair()
    pure = {
        "inherited": {"inherited_ratio": 1.0},
        "adaptive": {"adaptive_ratio": 1.0},
        "fixed": {"adaptive_ratio": 0.0},
    }
    mixed = losses_of(
        distiller(student, teacher, inherited_ratio=0.25, adaptive_ratio=0.4), images, targets
    )
    shares = {"inherited": 0.25, "adaptive": 0.75 * 0.4, "fixed": 0.75 * 0.6}
    for name, settings in pure.items():
        alone = over(name, losses_of(distiller(student, teacher, **settings), images, targets))
        found = over(name, mixed)
        assert found == {k: pytest.approx(shares[name] * v, rel=1e-5) for k, v in alone.items()}


def test_a_ratio_of_zero_changes_no_bit(pair: Pair, images: ImageBatch, targets: Targets) -> None:
    student, teacher = pair()
    before = losses_of(distiller(student, teacher), images, targets)
    after = losses_of(distiller(student, teacher, inherited_ratio=0.0), images, targets)
    assert {k: v.item() for k, v in before.items()} == {k: v.item() for k, v in after.items()}


OTHERS: dict[str, dict[str, Any]] = {
    "fewer layers": {"decoder_layers": 1},
    "features": {"features": {"weight": 1.0}},
    "points": {"general_points": {"count": 5}},
    "a group all the same": {"auxiliary_group": {"always": True}},
    "half adaptive": {"inherited_ratio": 0.5, "adaptive_ratio": 1.0},
    "last layer": {"layer_map": "last"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_micro_batches_add_up_beside_every_other_term(
    pair: Pair, images: ImageBatch, targets: Targets, other: str
) -> None:
    settings = {"inherited_ratio": 1.0} | OTHERS[other]
    depth = {"decoder_layers": settings.pop("decoder_layers", 2)}
    module = distiller(*pair(**depth), **settings)
    whole = losses_of(module, images, targets)
    parts = losses_in_pieces(module, images, targets)
    for name, loss in whole.items():
        assert sum(p[name].item() for p in parts) == pytest.approx(loss.item(), rel=1e-4), name


@pytest.mark.parametrize(
    ("student", "text"),
    [
        ({"queries": 4}, r"4 queries\) and the teacher \(conditional_detr, 6 queries\) differ"),
        ({"name": "dab_detr"}, r"\(dab_detr, 6 queries\) and the teacher \(conditional_detr"),
        (
            FAMILY["deformable-two-stage"] | {"levels": 1},
            r"\(deformable_detr, queries of each image, feature levels: 1\) and the teacher \(cond",
        ),
    ],
)
def test_queries_that_cannot_have_been_inherited_are_refused(
    tiny_detector: Build, student: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        distiller(tiny_detector(seed=1, **student), tiny_detector(), inherited_ratio=0.5)


def test_one_query_has_no_self_attention_to_compare(tiny_detector: Build) -> None:
    with pytest.raises(UserError, match=r"distillation\.inherited_ratio leaves one"):
        distiller(tiny_detector(queries=1), tiny_detector(queries=1), inherited_ratio=1.0)


@pytest.mark.parametrize(("ours", "theirs"), [(5, 5), (4, 6), (6, 3)])
def test_pairs_of_one_place_come_first_and_the_rest_costs_least(ours: int, theirs: int) -> None:
    generator = torch.Generator().manual_seed(ours)
    costs = torch.rand(2, 3, ours, theirs, generator=generator) * 10
    places = [
        torch.stack([torch.randperm(8, generator=generator)[:count] for _ in range(3)])
        for count in (ours, theirs)
    ]
    found = Solver().start_named({"x": CostBlock("x", same_place_first(costs, *places))})()["x"]
    for layer in range(2):
        for image in range(3):
            mine, other = (part[image].tolist() for part in places)
            forced = {(i, j) for i, p in enumerate(mine) for j, q in enumerate(other) if p == q}
            rows, columns = (x[layer, image].tolist() for x in (found.rows, found.columns))
            pairs = {*zip(rows, columns, strict=True)}
            assert forced <= pairs and len(pairs) == min(ours, theirs)
            table = costs[layer, image]
            free = (
                [i for i in range(ours) if i not in {pair[0] for pair in forced}],
                [j for j in range(theirs) if j not in {pair[1] for pair in forced}],
            )
            least = cheapest(table[free[0]][:, free[1]])
            total = sum(table[i, j].item() for i, j in pairs - forced)
            assert total == pytest.approx(least, rel=1e-5)


def cheapest(costs: Tensor) -> float:
    """Of all assignments, by brute force."""
    if costs.shape[0] > costs.shape[1]:
        costs = costs.T
    orders = permutations(range(costs.shape[1]), costs.shape[0])
    return min(sum(costs[i, j].item() for i, j in enumerate(order)) for order in orders)


@pytest.fixture
def two_stage(tiny_detector: Build) -> Pair:
    """Student and teacher that choose their queries in each image."""
    kind = FAMILY["deformable-two-stage"]
    return lambda **changes: (tiny_detector(seed=1, **kind | changes), tiny_detector(**kind))


def test_a_two_stage_student_that_is_its_teacher_has_nothing_to_learn(
    two_stage: Pair, images: ImageBatch, targets: Targets
) -> None:
    _, teacher = two_stage()
    module = distiller(copy.deepcopy(teacher), teacher, inherited_ratio=1.0)
    found = losses_of(module, images, targets)
    assert {name.split("/")[0] for name in found} == {"detection", "proposals", "inherited"}
    inherited = over("inherited", found)
    assert set(inherited) == DISTILLATION_TERMS
    assert all(abs(loss) < tolerance(name) for name, loss in inherited.items()), inherited


def test_places_of_other_grids_are_refused_before_a_step(two_stage: Pair) -> None:
    finer = {"name": "small", "stem_width": 8, "stage_widths": (8, 16)}
    student, teacher = two_stage(backbone=finer)
    with pytest.raises(UserError, match=r"strides \[2, 4\] and the teacher's \[4, 8\] pixels"):
        distiller(student, teacher, inherited_ratio=0.5)


@pytest.mark.parametrize(
    ("backbone", "levels"),
    [
        ({"name": "resnet50", "norm": "group", "dilation": True}, 4),
        ({"name": "convnext_tiny"}, 5),
        ({"name": "small"}, 2),
    ],
    ids=["dilated", "further-levels", "small"],
)
def test_strides_are_those_of_the_levels(
    tiny_detector: Build, backbone: dict[str, Any], levels: int
) -> None:
    with torch.device("meta"):
        detector = tiny_detector(
            name="deformable_detr", backbone=backbone, levels=levels, feedforward=32
        )
        stages = detector.backbone.pyramid(torch.empty(1, 3, 203, 330), detector.levels.stages)
        maps = detector.levels(stages)
    expected = [(-(-203 // s), -(-330 // s)) for s in detector.level_strides]
    assert [tuple(part.shape[-2:]) for part in maps] == expected


@pytest.mark.parametrize("queries", [6, 4])
def test_two_stage_losses_are_mixed_and_add_up(
    two_stage: Pair, images: ImageBatch, targets: Targets, queries: int
) -> None:
    student, teacher = two_stage(queries=queries)
    half, whole = (distiller(student, teacher, inherited_ratio=i) for i in (0.5, 1.0))
    found = losses_of(whole, images, targets)
    pure = over("inherited", found)
    mixed = over("inherited", losses_of(half, images, targets))
    assert mixed == {k: pytest.approx(v / 2, rel=1e-5) for k, v in pure.items()}
    parts = losses_in_pieces(whole, images, targets)
    for name, loss in found.items():
        assert sum(p[name].item() for p in parts) == pytest.approx(loss.item(), rel=1e-4), name


def test_queries_of_one_place_are_pairs_whatever_they_cost(
    two_stage: Pair, images: ImageBatch, targets: Targets
) -> None:
    student, teacher = two_stage()
    module = distiller(student, teacher, inherited_ratio=1.0)
    taught = module.run_teacher(images)
    assert taught is not None and isinstance(module.method, D3ETR)
    memory = student.encode(images)
    queries = student.object_queries(memory)
    ours = StudentOutputs(
        memory, {"detection": student.decode(memory, [queries])[0]}, queries.place
    )
    problems = module.method.costs(ours, taught, targets)
    pairs = module.solver.start_named(problems)()["inherited"]
    theirs = taught.groups["detection"].queries.place
    assert ours.place is not None and theirs is not None
    shared = 0
    for image in range(3):
        mine, other = ours.place[image], theirs[image]
        common = {*mine.tolist()} & {*other.tolist()}
        for layer in range(2):
            rows, columns = pairs.rows[layer, image], pairs.columns[layer, image]
            same = mine[rows] == other[columns]
            assert {*mine[rows][same].tolist()} == common
        shared += len(common)
    assert 0 < shared < 18
    with pytest.raises(UserError, match=r"feature levels .* differ"):
        other_grid = replace(ours, memory=replace(memory, levels=((1, 1), (1, 1))))
        module.method.costs(other_grid, taught, targets)
    with pytest.raises(UserError, match="detector of the student does not say"):
        module.method.costs(replace(ours, place=None), taught, targets)
