"""What LW-DETR and RF-DETR have of their own: windows, boxes beyond the picture, copies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import FAMILY, tiny_detector_config
from torch import Tensor

from d3etr.config.backbone import BackboneConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.config.vit import ViTConfig
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.build import build_detector
from d3etr.detectors.grouped import COPIES, GroupedDetector
from d3etr.detectors.heads import moved_boxes
from d3etr.detectors.init_from import part_of
from d3etr.detectors.vit import Block, WindowedViT
from d3etr.losses.copies import blocks_as_layers
from d3etr.losses.set_criterion import detection_problem, set_losses
from d3etr.matching.assignment import assign
from d3etr.structures import MAIN, DecoderOutputs, ImageBatch, Targets

KINDS = ("lw_detr", "rf_detr")
VIT: dict[str, Any] = {
    "width": 16,
    "blocks": 2,
    "heads": 2,
    "expansion": 2,
    "patch": 4,
    "whole": [],
    "outputs": [1, 2],
    "positions": 3,
}


def targets() -> Targets:
    boxes = torch.tensor([[[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2]]]).repeat(2, 1, 1)
    counts = torch.tensor([2, 2])
    return Targets(torch.tensor([[0, 2], [1, 0]]), boxes, (2, 2), (1, 2), ((32, 32),) * 2, counts)


def detector(kind: str, **changes: Any) -> GroupedDetector:
    """With heads that do not start at zero."""
    torch.manual_seed(0)
    settings = {"width": 32, "heads": 4, **FAMILY[kind], **changes}
    built = build_detector(tiny_detector_config(**settings), 3).eval()
    assert isinstance(built, GroupedDetector)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "head" in name or name.startswith("reference_moves"):
                parameter.normal_(std=0.3)
    return built


def vit(**changes: Any) -> WindowedViT:
    torch.manual_seed(0)
    config = ViTConfig.model_validate(VIT | changes, strict=False)
    network = build_backbone(BackboneConfig(name="vit", vit=config))
    assert isinstance(network, WindowedViT)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


@torch.no_grad()
def test_blocks_over_the_whole_image_know_nothing_of_windows() -> None:
    pixels = torch.randn(2, 3, 24, 32)
    windowed = vit(kind="lw_detr", windows=2, whole=[0, 1])
    plain = vit(kind="lw_detr", windows=1)
    plain.load_state_dict(windowed.state_dict())
    for one, other in zip(windowed.maps(pixels), plain.maps(pixels), strict=True):
        assert one.shape == (2, 16, 6, 8)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2", "lw_detr"])
@torch.no_grad()
def test_a_window_sees_nothing_of_others(kind: str) -> None:
    network, pixels = vit(kind=kind, windows=2), torch.randn(1, 3, 24, 32)
    changed = pixels.clone()
    changed[..., 12:, :16] += 1  # the window below at the left
    for one, other in zip(network.maps(pixels), network.maps(changed), strict=True):
        differs = (one - other).abs().amax(1)[0] > 1e-6
        assert differs[3:, :4].all() and differs.sum() == 12


@torch.no_grad()
def test_maps_are_as_large_as_strides_say_whatever_the_windows() -> None:
    network = vit(windows=3)
    for size, grid in {(24, 36): (6, 9), (29, 31): (8, 8), (30, 5): (8, 2)}.items():
        pixels = torch.randn(1, 3, *size)
        padded = torch.zeros(1, 3, *(-(-side // 12) * 12 for side in size))
        padded[..., : size[0], : size[1]] = pixels
        found, expected = network(pixels), network(padded)
        assert found.shape[-2:] == grid
        assert torch.equal(found, expected[..., : grid[0], : grid[1]])


def test_drop_path_rises_over_the_blocks_and_leaves_the_mean_as_it_is() -> None:
    torch.manual_seed(0)
    config = ViTConfig.model_validate(VIT | {"blocks": 3, "outputs": [3]}, strict=False)
    network = build_backbone(BackboneConfig(name="vit", vit=config, drop_path=0.5))
    assert isinstance(network, WindowedViT)
    blocks = [block for block in network.blocks if isinstance(block, Block)]
    assert [block.drop_path for block in blocks] == [0.0, 0.25, 0.5]
    branch = torch.ones(4000, 1, 1)
    kept = blocks[2].train()._kept(branch)
    assert set(kept.unique().tolist()) == {0.0, 2.0} and abs(kept.mean().item() - 1) < 0.05
    assert torch.equal(blocks[2].eval()._kept(branch), branch)
    assert torch.equal(blocks[0].train()._kept(branch), branch)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"heads": 3}, "must be a multiple of heads"),
        ({"outputs": [1]}, "later blocks would have no effect"),
        ({"outputs": [2, 2]}, "must rise"),
        ({"windows": 1, "whole": [0]}, "whole has no effect with one window"),
        ({"whole": [2]}, "whole names block 2 of 2"),
    ],
)
def test_networks_that_are_none_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        ViTConfig.model_validate(VIT | changes, strict=False)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scales": [1.0, 2.0]}, "finest first"),
        ({"scales": [1.5]}, "some of 2, 1 and 0.5"),
        ({"cross_heads": 5}, "must be a multiple of cross_heads"),
        ({"encoder_layers": 1}, "less than or equal to 0"),
        ({"backbone": {"name": "vit", "frozen_stages": 1}}, "set trainable to false"),
        ({"backbone": {"name": "small", "vit": {"windows": 4}}}, "vit has no effect"),
        ({"backbone": {"name": "vit", "norm": "group"}}, "norm has no effect"),
    ],
)
def test_settings_that_fit_nothing_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        tiny_detector_config(**{**FAMILY["lw_detr"], **changes})


def test_moves_are_shares_of_sides() -> None:
    box = torch.tensor([0.5, 0.4, 0.2, 0.1])
    moves = torch.tensor([1.0, -2.0, 0.0, torch.tensor(3.0).log()])
    torch.testing.assert_close(moved_boxes(box, moves), torch.tensor([0.7, 0.2, 0.2, 0.3]))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_references_beyond_the_picture_are_passed_on_as_they_are(kind: str) -> None:
    model, images = detector(kind), ImageBatch(torch.randn(2, 3, 32, 32))
    model.reference_moves.weight[:, 2:] += 4
    memory = model.encode(images)
    queries = model.object_queries(memory)
    assert queries.reference_boxes is not None and queries.reference_logits is not None
    assert queries.reference_boxes.max() > 1 and queries.reference_logits.isfinite().all()
    passed = replace(queries, content=None)
    cut = replace(passed, reference_boxes=None)
    outputs = model.decode(memory, [queries, passed, cut])
    assert torch.equal(outputs[0].boxes_cxcywh, outputs[1].boxes_cxcywh)
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert not torch.allclose(outputs[0].boxes_cxcywh, outputs[2].boxes_cxcywh)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_the_main_group_do_not_reach_each_other(kind: str) -> None:
    model, images = detector(kind).train(), ImageBatch(torch.randn(2, 3, 32, 32))
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval()
    memory, count = model.encode(images), model.config.groups
    groups = model.training_groups(memory, targets(), 0)
    assert [*groups] == [MAIN, COPIES] and {group.copies for group in groups.values()} == {count}
    together = model.decode(memory, [group.queries for group in groups.values()])
    [alone] = model.decode(memory, [model.object_queries(memory)])
    torch.testing.assert_close(together[0].logits, alone.logits)
    gradients = torch.autograd.grad(
        together[1].logits[..., : alone.queries, :].sum(),
        [model.query_content.weight],
    )
    reached = gradients[0].abs().sum(1) > 0
    queries = model.config.queries
    assert reached[queries : queries + alone.queries].all()
    assert reached.sum() == alone.queries  # of the first copy, and of nobody else


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_group_of_evaluation_is_the_first_of_training(kind: str) -> None:
    model, images = detector(kind), ImageBatch(torch.randn(2, 3, 32, 32))
    memory = model.encode(images)
    assert memory.proposals is not None and memory.proposals.layers == 1
    assert not model.training_groups(memory, targets(), 0)
    assert not detector(kind, groups=1).train().training_groups(memory, targets(), 0)


def test_each_block_is_matched_by_itself() -> None:
    """As many assignments and losses as blocks and layers, computed one after the other."""
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 2, 12, 3), torch.rand(2, 2, 12, 4) * 0.4 + 0.1
    whole, config = blocks_as_layers(DecoderOutputs(logits, boxes), 3), SetCriterionConfig()

    def losses(outputs: DecoderOutputs) -> dict[str, Tensor]:
        [assignment] = assign([detection_problem("test", outputs, targets(), config)])
        return set_losses(outputs, targets(), assignment, torch.tensor(4.0), config)

    parts = [
        losses(
            DecoderOutputs(logits[layer : layer + 1, :, block], boxes[layer : layer + 1, :, block])
        )
        for layer in range(2)
        for block in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    for name, loss in losses(whole).items():
        torch.testing.assert_close(loss, torch.stack([part[name] for part in parts]).sum())


def test_parts_of_selections_are_heads_and_queries() -> None:
    assert part_of("proposals.11.class_head.weight") == "heads"
    assert part_of("proposals.0.box_head.layers.0.bias") == "heads"
    assert part_of("proposals.0.norm.weight") == "queries"
    assert part_of("reference_moves.weight") == "queries"
