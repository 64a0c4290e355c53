"""Denoising queries: how many, of what, drawn from what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.denoising import (
    DENOISING,
    DenoisingConfig,
    DenoisingNoise,
    denoising_blocks,
    denoising_group,
    draw_noise,
    noised_objects,
    touching,
)
from d3etr.engine.graphs import padded
from d3etr.losses.supervision import GroundTruthSupervision
from d3etr.matching.assignment import Solver
from d3etr.structures import (
    DecoderOutputs,
    ImageBatch,
    ObjectQueries,
    QueryGroup,
    Supervision,
    Targets,
)

CLASSES, WIDTH = 5, 8
CONFIG = DenoisingConfig(queries=20)


def scene(
    counts: tuple[int, ...], ids: tuple[int, ...] | None = None, known: int | None = None
) -> Targets:
    generator = torch.Generator().manual_seed(0)
    used = torch.arange(max(counts, default=0)) < torch.tensor(counts)[:, None]
    labels = torch.randint(CLASSES, used.shape, generator=generator)
    boxes = torch.rand(*used.shape, 4, generator=generator) * 0.3 + 0.2
    return Targets(
        labels * used,
        boxes * used[..., None],
        counts,
        ids or tuple(range(len(counts))),
        ((64, 64),) * len(counts),
        torch.tensor(counts),
        known,
    )


def table() -> Tensor:
    return torch.randn(CLASSES + 1, WIDTH, generator=torch.Generator().manual_seed(1))


def group_of(targets: Targets, config: DenoisingConfig = CONFIG, step: int = 0) -> QueryGroup:
    return denoising_group(targets, table(), config, step=step)


def features(group: QueryGroup) -> tuple[Tensor, Tensor, Tensor]:
    content, boxes, objects = group.queries.content, group.queries.reference_logits, group.objects
    assert content is not None and boxes is not None and objects is not None
    return content, boxes, objects


@pytest.mark.parametrize(
    ("counts", "queries", "expected"),
    [
        ((2, 0, 1), 20, (10, 2)),
        ((3, 1), 20, (6, 3)),
        ((9,), 4, (1, 9)),
        ((0, 0), 20, (0, 0)),
        ((), 20, (0, 0)),
        ((2, 1), 0, (0, 0)),
    ],
)
def test_as_many_blocks_as_fit(
    counts: tuple[int, ...], queries: int, expected: tuple[int, int]
) -> None:
    assert denoising_blocks(scene(counts), DenoisingConfig(queries=queries)) == expected


def test_without_objects_a_group_has_no_queries() -> None:
    none = DenoisingConfig(queries=0)
    groups = [
        group_of(scene((0, 0))),
        group_of(scene((0, 4), known=1)),
        group_of(scene((3,)), none),
    ]
    for group, images in zip(groups, (2, 2, 1), strict=True):
        content, boxes, objects = features(group)
        shapes = [tuple(part.shape) for part in (content, boxes, objects)]
        assert shapes == [(images, 0, 8), (images, 0, 4), (images, 0)]
        assert group.queries.count == group.queries.blocks == 0 and group.pairs == (0,) * images


def test_a_group_says_how_it_learns() -> None:
    group = group_of(scene((2, 0, 1)))
    assert group.supervision is Supervision.GIVEN
    assert (group.queries.blocks, group.copies, group.pairs) == (10, 10, (20, 0, 10))
    assert group.queries.count == 40
    assert not group.queries.embedding.any()
    _, _, objects = features(group)
    assert objects[0].tolist() == [0, 1, -1, -1] * 10
    assert objects[1].tolist() == [-1] * 40
    assert objects[2].tolist() == [0, -1, -1, -1] * 10


def test_the_same_step_and_images_draw_the_same() -> None:
    first, again = (features(group_of(scene((2, 1)), step=7)) for _ in range(2))
    assert all(map(torch.equal, first, again))
    for other in (
        group_of(scene((2, 1)), step=8),
        group_of(scene((2, 1), ids=(5, 6)), step=7),
        denoising_group(scene((2, 1)), table(), CONFIG, step=7, seed=1),
    ):
        assert not torch.equal(features(other)[1], first[1])


def test_the_host_reads_nothing_from_the_device() -> None:
    """A tensor of the device ``meta`` has no values that anybody could wait for."""
    targets = scene((2, 1, 7), known=2).to(torch.device("meta"))
    group = denoising_group(targets, table().to("meta"), CONFIG, step=0)
    supervision = GroundTruthSupervision(SetCriterionConfig(class_loss="varifocal"), Solver())
    shape = (2, 3, group.queries.count)
    outputs = DecoderOutputs(
        torch.empty(*shape, CLASSES, device="meta"), torch.empty(*shape, 4, device="meta")
    )
    sums = {"objects": torch.empty((), device="meta")}
    given = {DENOISING: group}
    losses = supervision.begin({DENOISING: outputs}, given, None, dict, targets, sums)()
    assert {name: loss.shape for name, loss in losses.items()} == {
        f"{DENOISING}/{term}": () for term in ("class", "l1", "giou")
    }
    counting = {DENOISING: replace(group, pairs=None)}
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        supervision.begin({DENOISING: outputs}, counting, None, dict, targets, sums)()


def test_no_other_generator_is_drawn_from() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    group_of(scene((2, 1)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_image_draws_the_same_in_every_batch() -> None:
    together = features(group_of(scene((2, 2), ids=(3, 9))))
    whole = scene((2, 2), ids=(3, 9))
    for image in range(2):
        alone = features(group_of(whole.of_images([image])))
        for mine, other in zip(alone, together, strict=True):
            assert torch.equal(mine[0], other[image])


def test_images_without_labels_learn_nothing_and_decide_nothing() -> None:
    known, mixed = scene((2, 1)), scene((2, 1, 7), known=2)
    group, alone = group_of(mixed), group_of(known)
    assert group.pairs == (20, 10, 0) and group.queries.count == alone.queries.count
    content, _, objects = features(group)
    assert (objects[2] == -1).all()
    assert torch.equal(content[2], table()[CLASSES].expand_as(content[2]))
    assert torch.equal(objects[:2], features(alone)[2])


def test_unused_slots_of_recorded_shapes_change_nothing() -> None:
    targets = scene((2, 0, 1))
    _, wide = padded(ImageBatch(torch.zeros(3, 3, 64, 64)), targets)
    assert wide.labels.shape[1] > targets.labels.shape[1]
    for mine, other in zip(features(group_of(wide)), features(group_of(targets)), strict=True):
        assert torch.equal(mine, other)


def test_noise_keeps_to_its_bounds() -> None:
    """Corners of positives move by less than half a side, those of negatives by up to a whole."""
    targets = scene((3,))
    count = 2 * 3 * denoising_blocks(targets, CONFIG)[0]
    noise = draw_noise((0,), count, CLASSES, step=0)
    labels, logits, objects = noised_objects(targets, noise, CLASSES, CONFIG)
    boxes, slot = logits.sigmoid()[0], torch.arange(count) % 3
    truth = targets.boxes_cxcywh[0, slot]
    corners = [
        torch.cat([x[:, :2] - x[:, 2:] / 2, x[:, :2] + x[:, 2:] / 2], 1) for x in (boxes, truth)
    ]
    moved = (corners[0] - corners[1]).abs() / truth[:, 2:].repeat(1, 2) * 2
    inside = ((corners[1] > 0.3) & (corners[1] < 0.7)).all(1) & (boxes[:, 2:] > 1e-4).all(1)
    positive = objects[0] >= 0
    assert moved[positive].max() <= 1 + 1e-4
    assert (moved[~positive & inside] >= 1 - 1e-3).all()
    kept = labels[0] == targets.labels[0, slot]
    assert 0.6 < kept.float().mean() < 1


def test_label_noise_is_halved() -> None:
    config = DenoisingConfig(queries=4000, label_noise=0.5, box_noise=0.0)
    targets = scene((1,))
    blocks, _ = denoising_blocks(targets, config)
    noise = draw_noise((0,), 2 * blocks, CLASSES, step=0)
    labels, logits, _ = noised_objects(targets, noise, CLASSES, config)
    changed = (labels != targets.labels[0, 0]).float().mean().item()
    assert changed == pytest.approx(0.25 * (1 - 1 / CLASSES), abs=0.02)
    assert torch.allclose(logits.sigmoid(), targets.boxes_cxcywh[:, :1], atol=1e-5)


def test_boxes_of_the_whole_image_have_finite_logits() -> None:
    targets = replace(scene((1,)), boxes_cxcywh=torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]))
    ones = torch.ones(1, 2, 4)
    for signs in (ones, -ones):
        noise = DenoisingNoise(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int64), ones, signs)
        _, logits, _ = noised_objects(targets, noise, CLASSES, DenoisingConfig(queries=1))
        assert logits.isfinite().all()


def test_the_row_of_unused_slots_gets_no_gradient() -> None:
    embedding = table().requires_grad_(True)
    group = denoising_group(scene((2, 1)), embedding, CONFIG, step=0)
    [gradient] = torch.autograd.grad(features(group)[0].square().sum(), [embedding])
    assert not gradient[CLASSES].any() and gradient[:CLASSES].any()


@pytest.mark.parametrize("content", [None, torch.ones(3, WIDTH)])
def test_touching_changes_no_value_and_gives_a_gradient_of_zero(content: Tensor | None) -> None:
    embedding = table().requires_grad_(True)
    queries = touching(ObjectQueries(torch.ones(3, WIDTH), content=content), embedding)
    touched = queries.embedding if content is None else queries.content
    assert touched is not None and torch.equal(touched, torch.ones(3, WIDTH))
    [gradient] = torch.autograd.grad(touched.sum(), [embedding])
    assert torch.equal(gradient, torch.zeros_like(embedding))
