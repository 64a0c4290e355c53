"""Denoising queries, whom they see and their losses equal Hugging Face's RT-DETR's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_criterion_parity import as_targets, random_labels
from test_quality_loss_parity import their_config
from torch import Tensor, nn

from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.attention import attend_in_blocks
from d3etr.detectors.denoising import (
    DENOISING,
    DenoisingConfig,
    DenoisingNoise,
    denoising_blocks,
    denoising_group,
    draw_noise,
)
from d3etr.losses.supervision import GroundTruthSupervision
from d3etr.matching.assignment import Solver
from d3etr.structures import (
    MAIN,
    DecoderOutputs,
    ObjectQueries,
    QueryGroup,
    Supervision,
    Targets,
)

rt_detr = pytest.importorskip("transformers.models.rt_detr.modeling_rt_detr")
rt_detr_loss = pytest.importorskip("transformers.loss.loss_rt_detr")

CLASSES, LAYERS, QUERIES, WIDTH = 7, 3, 25, 16
MANY, ONE_EMPTY, CROWD = (3, 0, 6, 1), (0, 2, 0, 0), (1, 9, 4, 0)


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Hands Hugging Face's function the numbers of a ``DenoisingNoise`` in its own order."""

    def use(noise: DenoisingNoise) -> None:
        uniform = iter((noise.doubts, noise.moves))
        whole = iter((noise.classes, (noise.signs + 1) / 2))
        monkeypatch.setattr(torch, "rand_like", lambda *_, **__: next(uniform))

        def whole_like(like: Tensor, *_: Any, dtype: torch.dtype | None = None) -> Tensor:
            return next(whole).to(dtype or like.dtype)

        monkeypatch.setattr(torch, "randint_like", whole_like)

    yield use


def table() -> nn.Embedding:
    torch.manual_seed(4)
    return nn.Embedding(CLASSES + 1, WIDTH, padding_idx=CLASSES)


def our_group(
    targets: Targets, embedding: nn.Embedding, config: DenoisingConfig, step: int = 3
) -> tuple[QueryGroup, DenoisingNoise]:
    blocks, fullest = denoising_blocks(targets, config)
    count = 2 * blocks * fullest
    noise = draw_noise(targets.image_ids, count, CLASSES, seed=1, step=step)
    group = denoising_group(targets, embedding.weight, config, step=step, seed=1)
    assert group.queries.count == count
    return group, noise


@pytest.mark.parametrize("counts", [MANY, ONE_EMPTY, CROWD])
@pytest.mark.parametrize(
    ("queries", "label_noise", "box_noise"), [(100, 0.5, 1.0), (8, 1.0, 0.4), (3, 0.0, 2.0)]
)
def test_queries_equal_hugging_faces(
    same_noise: Any, counts: tuple[int, ...], queries: int, label_noise: float, box_noise: float
) -> None:
    config = DenoisingConfig(queries=queries, label_noise=label_noise, box_noise=box_noise)
    labels, embedding = random_labels(counts), table()
    group, noise = our_group(as_targets(labels), embedding, config)
    if not label_noise:  # theirs draws none then
        noise = replace(noise, doubts=noise.moves, classes=((noise.signs + 1) / 2))
    same_noise(noise)
    content, boxes, mask, meta = rt_detr.get_contrastive_denoising_training_group(
        labels, CLASSES, QUERIES, embedding, queries, label_noise, box_noise
    )
    assert group.queries.content is not None and group.queries.reference_logits is not None
    torch.testing.assert_close(group.queries.content, content, atol=0, rtol=0)
    torch.testing.assert_close(group.queries.reference_logits, boxes, atol=1e-6, rtol=1e-6)
    assert group.queries.blocks == group.copies == meta["dn_num_group"]
    assert group.queries.count == meta["dn_num_split"][0]
    assert group.objects is not None and group.pairs is not None
    for image, places in enumerate(meta["dn_positive_idx"]):
        own = group.objects[image]
        assert (own >= 0).nonzero()[:, 0].tolist() == places.tolist()
        assert own[places].tolist() == list(range(counts[image])) * group.copies
        assert group.pairs[image] == len(places)
    assert_sees_the_same(group.queries, mask)


def assert_sees_the_same(queries: ObjectQueries, mask: Tensor) -> None:
    """Theirs has denoising queries first, the main ones after them."""
    count = queries.count
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, count + QUERIES, 4) for _ in range(3))
    own = [x[:, :, :count] for x in (query, key, value)]
    shared = key[:, :, count:], value[:, :, count:]
    ours, _ = attend_in_blocks(own[0], own[1], own[2], shared, queries.blocks, 0.0)
    dense = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    theirs = dense.transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours, theirs[:, :count], atol=1e-6, rtol=1e-5)
    main = [x[:, :, count:] for x in (query, key, value)]
    alone = nn.functional.scaled_dot_product_attention(*main).transpose(1, 2).flatten(2)
    torch.testing.assert_close(alone, theirs[:, count:], atol=1e-6, rtol=1e-5)


def outputs_of(layers: int, images: int, queries: int, seed: int) -> DecoderOutputs:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, images, queries, CLASSES, generator=generator) * 2
    boxes = torch.rand(layers, images, queries, 4, generator=generator) * 0.5 + 0.1
    return DecoderOutputs(logits.requires_grad_(True), boxes.requires_grad_(True))


@pytest.mark.parametrize("counts", [MANY, ONE_EMPTY, CROWD, (0, 0, 0, 0)])
def test_all_losses_of_a_step_equal_hugging_faces(counts: tuple[int, ...]) -> None:
    """Of the main group, proposals that tell classes and denoising queries, each by its divisor."""
    criterion = SetCriterionConfig(class_loss="varifocal", class_weight=1.0)
    labels, images = random_labels(counts), len(counts)
    targets, config = as_targets(labels), DenoisingConfig(queries=20)
    decoded = {MAIN: outputs_of(LAYERS, images, QUERIES, 0)}
    groups = {MAIN: QueryGroup(ObjectQueries(torch.zeros(QUERIES, WIDTH)))}
    meta: dict[str, Any] | None = None
    if any(counts):
        group, _ = our_group(targets, table(), config)
        groups[DENOISING] = group
        count = group.queries.count
        decoded[DENOISING] = outputs_of(LAYERS, images, count, 1)
        _, _, _, meta = rt_detr.get_contrastive_denoising_training_group(
            labels, CLASSES, QUERIES, table(), config.queries
        )
    proposals = outputs_of(1, images, QUERIES, 2)
    supervision = GroundTruthSupervision(criterion, Solver(threads=0), True)
    ours = supervision.begin(
        decoded,
        groups,
        proposals,
        supervision.start_teachers(groups, targets),
        targets,
        {"objects": targets.num_objects.sum().float()},
    )()
    theirs = their_losses(decoded, proposals, meta, labels, criterion)
    assert ours.keys() == theirs.keys()
    for name, loss in ours.items():
        torch.testing.assert_close(loss, theirs[name], rtol=1e-5, atol=1e-6)
    total, their_total = (torch.stack(list(x.values())).sum() for x in (ours, theirs))
    for outputs in (*decoded.values(), proposals):
        inputs = [outputs.logits, outputs.boxes_cxcywh]
        gradients = [
            torch.autograd.grad(x, inputs, retain_graph=True, materialize_grads=True)
            for x in (total, their_total)
        ]
        for mine, other in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def their_losses(
    decoded: dict[str, DecoderOutputs],
    proposals: DecoderOutputs,
    meta: dict[str, Any] | None,
    labels: list[dict[str, Tensor]],
    criterion: SetCriterionConfig,
) -> dict[str, Tensor]:
    """Under our names, layers added up."""
    config = their_config(criterion)
    config.auxiliary_loss = True
    main = decoded[MAIN]
    parts = [decoded[DENOISING], main] if DENOISING in decoded else [main]
    logits = torch.cat([part.logits for part in parts], 2).transpose(0, 1)
    boxes = torch.cat([part.boxes_cxcywh for part in parts], 2).transpose(0, 1)
    _, found, _ = rt_detr_loss.RTDetrForObjectDetectionLoss(
        logits[:, -1],
        labels,
        logits.device,
        boxes[:, -1],
        config,
        logits,
        boxes,
        proposals.logits[0],
        proposals.boxes_cxcywh[0],
        meta,
    )
    sums: dict[str, Tensor] = {}
    for key, loss in found.items():
        term = {"loss_vfl": "class", "loss_bbox": "l1", "loss_giou": "giou"}[
            "_".join(key.split("_")[:2])
        ]
        name = DENOISING if "_dn_" in key else MAIN
        if key.endswith(f"_aux_{LAYERS - 1}"):
            name = "proposals"
        sums[f"{name}/{term}"] = sums.get(f"{name}/{term}", torch.zeros(())) + loss
    return sums


def test_the_slow_loop_says_the_same_of_given_objects() -> None:
    """Without pairs of the host, and with an order of queries that is not that of blocks."""
    targets = as_targets(random_labels(MANY))
    objects = torch.tensor([[2, -1, 0, 1, 1], [-1] * 5, [5, -1, -1, 3, 0], [-1, 0, -1, -1, 0]])
    outputs = outputs_of(LAYERS, 4, 5, 3)
    group = QueryGroup(
        ObjectQueries(torch.zeros(5, WIDTH)), Supervision.GIVEN, objects=objects, copies=2
    )
    supervision = GroundTruthSupervision(SetCriterionConfig(), Solver(threads=0))
    found = supervision.begin(
        {"given": outputs},
        {"given": group},
        None,
        dict,
        targets,
        {"objects": torch.tensor(10.0)},
    )()
    expected = 0.0
    for layer in range(LAYERS):
        for image, row in enumerate(objects.tolist()):
            for query, place in enumerate(row):
                if place >= 0:
                    box = outputs.boxes_cxcywh[layer, image, query]
                    expected += (box - targets.boxes_cxcywh[image, place]).abs().sum().item()
    assert found["given/l1"].item() == pytest.approx(5.0 * expected / (10 * 2), rel=1e-5)
