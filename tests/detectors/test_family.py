"""Every detector of the family: groups, padding, attention on request, gradients, precision."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import FAMILY, tiny_detector_config
from torch import Tensor

from d3etr.attention_maps import MASKED_SCORE
from d3etr.config.backbone import BackboneConfig
from d3etr.config.detector import DetectorConfig, detector_config
from d3etr.detectors.base import DetectionTransformer, SingleScaleDetector
from d3etr.detectors.build import build_detector, count_parameters
from d3etr.detectors.grouped import GroupedDetector
from d3etr.detectors.heads import movable, sigmoid_logits
from d3etr.registry import DETECTORS
from d3etr.structures import (
    DecoderOutputs,
    ImageBatch,
    Memory,
    ObjectQueries,
)


def _images(padded: bool = True) -> ImageBatch:
    torch.manual_seed(1)
    pixels = torch.randn(3, 3, 32, 48)
    if not padded:
        return ImageBatch(pixels)
    padding = torch.zeros(3, 32, 48, dtype=torch.bool)
    padding[1, 17:], padding[2, :, 24:] = True, True
    return ImageBatch(pixels.masked_fill(padding[:, None], 0), padding)


def _group(detector: DetectionTransformer, count: int, images: int | None = None) -> ObjectQueries:
    torch.manual_seed(count)
    shape = (count,) if images is None else (images, count)
    size = detector.config.reference_size
    reference = torch.randn(*shape, size) if size else None
    content = torch.randn(*shape, 32) if detector.config.takes_content else None
    return ObjectQueries(torch.randn(*shape, 32), reference, content)


def _own(
    detector: DetectionTransformer, images: ImageBatch, attention: bool = False
) -> DecoderOutputs:
    memory = detector.encode(images)
    (outputs,) = detector.decode(memory, [detector.object_queries(memory)], attention=attention)
    return outputs


def _assert_same(one: DecoderOutputs, other: DecoderOutputs, tolerance: float = 1e-5) -> None:
    names = ["logits", "boxes_cxcywh"]
    if one.self_maps is not None and other.self_maps is not None:
        names += ["self_attention", "cross_attention"]
    for name in names:
        a, b = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_every_detector_keeps_the_contract(tiny_detector: DetectionTransformer) -> None:
    memory = tiny_detector.encode(_images())
    (outputs,) = tiny_detector.decode(
        memory, [tiny_detector.object_queries(memory)], attention=True
    )
    strides = tiny_detector.level_strides
    assert strides in ((8,), (4, 8), (8, 16))  # the last where a lite encoder halves a map
    levels = tuple((32 // stride, 48 // stride) for stride in strides)
    tokens = sum(height * width for height, width in levels)
    assert memory.levels == outputs.levels == levels
    assert memory.tokens.shape == (3, tokens, 32)
    assert outputs.logits.shape == (3, 3, 6, 5)
    assert outputs.boxes_cxcywh.shape == (3, 3, 6, 4)
    assert outputs.self_attention.shape == (3, 3, 4, 6, 6)
    assert outputs.cross_attention.shape == (3, 3, 4, 6, tokens)
    torch.testing.assert_close(outputs.cross_attention.sum(-1), torch.ones(3, 3, 4, 6))
    assert tiny_detector.stride == 32 // levels[0][0]
    assert tiny_detector.classes == 5
    assert outputs.padding is memory.padding is not None
    assert outputs.boxes_cxcywh.min() >= 0
    assert outputs.boxes_cxcywh.max() <= 1


def test_every_detector_is_tested(family: dict[str, dict[str, object]]) -> None:
    assert {config["name"] for config in family.values()} == set(DETECTORS.names)


@pytest.mark.parametrize("attention", [False, True])
@torch.no_grad()
def test_groups_decoded_together_equal_groups_decoded_apart(
    tiny_detector: DetectionTransformer, attention: bool
) -> None:
    memory = tiny_detector.encode(_images())
    groups = [
        tiny_detector.object_queries(memory),
        _group(tiny_detector, 4),
        _group(tiny_detector, 9),
        _group(tiny_detector, 5, images=3),
    ]
    together = tiny_detector.decode(memory, groups, attention=attention)
    assert [outputs.queries for outputs in together] == [6, 4, 9, 5]
    for group, outputs in zip(groups, together, strict=True):
        (apart,) = tiny_detector.decode(memory, [group], attention=attention)
        _assert_same(outputs, apart)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_asking_for_attention_changes_nothing_else(
    tiny_detector: DetectionTransformer, padded: bool
) -> None:
    memory = tiny_detector.encode(_images(padded))
    groups = [tiny_detector.object_queries(memory), _group(tiny_detector, 4)]
    plain = tiny_detector.decode(memory, groups)
    asked = tiny_detector.decode(memory, groups, attention=True)
    for one, other in zip(plain, asked, strict=True):
        assert one.self_maps is None
        assert one.cross_maps is None
        _assert_same(one, other)


@torch.no_grad()
def test_queries_of_each_image_equal_shared_queries(tiny_detector: DetectionTransformer) -> None:
    memory = tiny_detector.encode(_images())
    shared = _group(tiny_detector, 4)
    own = ObjectQueries(
        *(
            None if part is None else part.expand(3, -1, -1)
            for part in (shared.embedding, shared.reference_logits, shared.content)
        )
    )
    (one,), (other,) = (tiny_detector.decode(memory, [g], attention=True) for g in (shared, own))
    _assert_same(one, other)


@torch.no_grad()
def test_a_groups_own_references_are_used(tiny_detector: DetectionTransformer) -> None:
    memory = tiny_detector.encode(_images())
    group = _group(tiny_detector, 4)
    if group.reference_logits is None:
        assert tiny_detector.config.reference_size == 0
        return
    moved = replace(group, reference_logits=group.reference_logits + 1)
    if isinstance(tiny_detector, GroupedDetector):  # boxes may be moved beyond the picture
        step = torch.tensor([1.0, 1.0, 0.0, 0.0])
        moved = replace(group, reference_logits=group.reference_logits + step)
    (before,), (after,) = (tiny_detector.decode(memory, [g]) for g in (group, moved))
    if isinstance(tiny_detector, GroupedDetector):
        assert moved.reference_logits is not None
        way = moved.reference_logits.sigmoid() - group.reference_logits.sigmoid()
        distance = (after.boxes_cxcywh - before.boxes_cxcywh)[..., :2].mean()
        assert (distance / way[:, :2].mean() - 1).abs() < 0.3
        return
    shift = after.boxes_cxcywh.logit() - before.boxes_cxcywh.logit()
    assert (shift[..., :2].mean() - 1).abs() < 0.2


@torch.no_grad()
def test_queries_without_reference_points_get_the_detectors(
    conditional_detr: DetectionTransformer,
) -> None:
    memory = conditional_detr.encode(_images())
    own = conditional_detr.object_queries(memory)
    (one,), (other,) = (
        conditional_detr.decode(memory, [group]) for group in (own, ObjectQueries(own.embedding))
    )
    _assert_same(one, other)


def test_references_of_another_size_are_refused(tiny_detector: DetectionTransformer) -> None:
    size = tiny_detector.config.reference_size
    if size == 0:  # it has no use for any
        return
    memory = tiny_detector.encode(_images())
    with pytest.raises(ValueError, match=r"\[.., N, [24]\]"):
        tiny_detector.decode(memory, [ObjectQueries(torch.zeros(2, 32), torch.zeros(2, 6 - size))])


@torch.no_grad()
def test_a_batch_equals_its_images_one_by_one(tiny_detector: DetectionTransformer) -> None:
    images = _images(padded=False)
    together = _own(tiny_detector, images, attention=True)
    for index in range(3):
        outputs = _own(tiny_detector, ImageBatch(images.pixels[index : index + 1]), attention=True)
        for name, tolerance in (("logits", 1e-5), ("cross_attention", 1e-5)):
            alone, beside = getattr(outputs, name)[:, 0], getattr(together, name)[:, index]
            torch.testing.assert_close(alone, beside, atol=tolerance, rtol=1e-5)


@torch.no_grad()
def test_padding_is_invisible_behind_the_backbone(
    tiny_detector: DetectionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backbones see padding's edge, as in DETR; encoder and decoder must not."""
    if not isinstance(tiny_detector, SingleScaleDetector):
        return  # its projections are convolutions with GroupNorm, which see it too
    features = torch.randn(1, 16, 3, 4)
    padded = torch.randn(1, 16, 5, 6)
    padded[..., :3, :4] = features
    padding = torch.ones(1, 40, 48, dtype=torch.bool)
    padding[:, :24, :32] = False
    queries = [tiny_detector.object_queries()]
    results = []
    for maps, mask in ((features, None), (padded, padding)):
        monkeypatch.setattr(tiny_detector.backbone, "forward", lambda _, maps=maps: maps)
        memory = tiny_detector.encode(ImageBatch(torch.empty(0), mask))
        results += tiny_detector.decode(memory, queries, attention=True)
    alone, beside = results
    torch.testing.assert_close(alone.logits, beside.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone.boxes_cxcywh, beside.boxes_cxcywh, atol=1e-5, rtol=1e-5)
    maps = beside.cross_attention.unflatten(-1, (5, 6))
    torch.testing.assert_close(
        alone.cross_attention.unflatten(-1, (3, 4)), maps[..., :3, :4], atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_nobody_looks_at_padding(tiny_detector: DetectionTransformer) -> None:
    outputs = _own(tiny_detector, _images(), attention=True)
    assert outputs.padding is not None
    hidden = outputs.padding[None, :, None, None].expand(outputs.cross_attention.shape)
    assert hidden.any()
    assert outputs.cross_attention[hidden].max() == 0
    assert outputs.cross_maps is not None
    assert (outputs.cross_maps.scores()[hidden] == MASKED_SCORE).all()


def test_gradients_reach_every_parameter(tiny_detector: DetectionTransformer) -> None:
    tiny_detector.train()
    memory = tiny_detector.encode(_images())
    (outputs,) = tiny_detector.decode(
        memory, [tiny_detector.object_queries(memory)], attention=True
    )
    loss = outputs.logits.square().sum() + outputs.boxes_cxcywh.square().sum()
    if memory.proposals is not None:
        loss = loss + memory.proposals.logits.square().sum()
        loss = loss + memory.proposals.boxes_cxcywh.square().sum()
    if outputs.distributions is not None:  # what comes before them has a loss of its own
        loss = loss + outputs.distributions.first_boxes.square().sum()
    (loss + outputs.cross_attention.square().sum()).backward()
    for name, parameter in tiny_detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_queries_of_one_group_do_not_reach_another(tiny_detector: DetectionTransformer) -> None:
    memory = tiny_detector.encode(_images())
    group = _group(tiny_detector, 4)
    parts = [
        part
        for part in (group.embedding, group.reference_logits, group.content)
        if part is not None
    ]
    for part in parts:
        part.requires_grad_()
    main, _ = tiny_detector.decode(memory, [tiny_detector.object_queries(memory), group])
    gradients = torch.autograd.grad(
        main.logits.sum(), parts, allow_unused=True, materialize_grads=True
    )
    assert all(gradient.abs().max() == 0 for gradient in gradients)


def test_dropout_tells_images_apart_in_training_only(tiny_detector: DetectionTransformer) -> None:
    torch.manual_seed(0)
    memory = tiny_detector.encode(ImageBatch(torch.randn(1, 3, 32, 32).expand(2, -1, -1, -1)))
    assert torch.allclose(memory.tokens[0], memory.tokens[1], atol=1e-5)
    queries = [tiny_detector.object_queries(memory)]

    def first_layer_difference() -> Tensor:
        (outputs,) = tiny_detector.decode(memory, queries)
        return (outputs.logits[0, 0] - outputs.logits[0, 1]).abs().max()

    assert first_layer_difference() < 1e-5
    tiny_detector.train()
    assert first_layer_difference() > 1e-3


@pytest.mark.parametrize("attention", [False, True])
def test_bfloat16_autocast_keeps_boxes_and_scores_in_float32(
    tiny_detector: DetectionTransformer, attention: bool
) -> None:
    images = _images()
    with torch.no_grad():
        exact = _own(tiny_detector, images)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = _own(tiny_detector, images, attention)
    assert outputs.boxes_cxcywh.dtype == outputs.logits.dtype == torch.float32
    if not tiny_detector.config.queries_need_images:  # there, other proposals may come first
        assert (outputs.boxes_cxcywh - exact.boxes_cxcywh).abs().mean() < 0.02
    outputs.logits.sum().backward()
    if attention:
        assert outputs.cross_maps is not None
        assert outputs.cross_maps.scores().dtype == torch.float32


@pytest.mark.slow
@torch.no_grad()
def test_compiles_as_one_graph(tiny_detector: DetectionTransformer) -> None:
    torch._dynamo.reset()  # it gives up on a function after eight kinds of detectors
    images = _images()
    encode = torch.compile(tiny_detector.encode, backend="eager", fullgraph=True)
    decode = torch.compile(tiny_detector.decode, backend="eager", fullgraph=True)
    memory = encode(images)
    assert isinstance(memory, Memory)
    queries = [tiny_detector.object_queries(memory), _group(tiny_detector, 4)]
    compiled = decode(memory, queries, attention=True)
    for one, other in zip(
        compiled, tiny_detector.decode(memory, queries, attention=True), strict=True
    ):
        _assert_same(one, other)


@pytest.mark.parametrize("kind", FAMILY)
def test_starts_at_the_prior_probability_and_the_configured_box_size(kind: str) -> None:
    torch.manual_seed(0)
    config = tiny_detector_config(box_size_bias=-1.4, width=32, **FAMILY[kind])
    detector = build_detector(config, 5).eval()
    memory = detector.encode(_images())
    queries = detector.object_queries(memory)
    (outputs,) = detector.decode(memory, [queries])
    size = torch.tensor(-1.4).sigmoid()
    if not config.softmax_classes:
        assert 0.002 < outputs.logits.sigmoid().mean() < 0.05
    if not config.queries_need_images:
        assert (outputs.boxes_cxcywh[..., 2:].mean() - size).abs() < 0.08
    if queries.reference_logits is not None:  # boxes start at their references
        expected = queries.reference_logits.sigmoid()[..., :2].expand(2, 3, -1, -1)
        torch.testing.assert_close(outputs.boxes_cxcywh[..., :2], expected)


def test_an_encoder_without_layers_passes_tokens_on(tiny_config: DetectorConfig) -> None:
    detector = build_detector(tiny_config.model_copy(update={"encoder_layers": 0}), 5).eval()
    assert detector.encode(_images()).tokens.shape == (3, 24, 32)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5])
def test_references_move_from_where_the_official_inverse_sigmoid_puts_them(epsilon: float) -> None:
    logits = torch.linspace(-40, 40, 4001, dtype=torch.float64).requires_grad_()
    boxes = logits.sigmoid()
    expected = (boxes.clamp(min=epsilon) / (1 - boxes).clamp(min=epsilon)).log()
    found = movable(logits, epsilon)
    torch.testing.assert_close(found, expected)
    (ours,), (theirs,) = (torch.autograd.grad(x.sum(), logits) for x in (found, expected))
    torch.testing.assert_close(ours, theirs)
    everything = torch.tensor([float("inf"), float("-inf")])
    limit = torch.tensor(-math.log(epsilon))
    torch.testing.assert_close(movable(everything, epsilon), torch.stack([limit, -limit]))


@pytest.mark.parametrize("kind", [kind for kind in FAMILY if "deformable" in kind])
@torch.no_grad()
def test_a_deformable_layers_boxes_are_computed_once(kind: str) -> None:
    detector = build_detector(tiny_detector_config(width=32, **FAMILY[kind]), 5).eval()
    calls: list[str] = []
    for name, module in detector.decoder.box_heads.named_children():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    _own(detector, _images())
    assert calls == (["0", "1"] if detector.config.box_refinement else ["0", "0"])


@torch.no_grad()
def test_softmax_probabilities_become_the_sigmoids_of_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 7, 4) * torch.tensor([1.0, 4.0, 20.0, 40.0, 3.0, 9.0, 0.1])[:, None]
    exact = logits.double().softmax(-1)[..., :-1]
    found = sigmoid_logits(logits, 3).sigmoid().double()
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)
    assert torch.equal(sigmoid_logits(logits, 2), sigmoid_logits(logits, 3)[..., :2])
    certain = torch.tensor([[60.0, 0.0, -60.0]])
    torch.testing.assert_close(sigmoid_logits(certain, 2), torch.tensor([[60.0, -60.0]]))


def test_the_benchmarks_detectors_have_the_published_sizes() -> None:
    sizes = {"width": 128, "feedforward": 256, "queries": 16, "decoder_layers": 3}
    student = detector_config(backbone=BackboneConfig(name="small"), encoder_layers=1, **sizes)
    wide = BackboneConfig(name="small", stem_width=32, stage_widths=(48, 96, 128), stage_blocks=2)
    teacher = detector_config(backbone=wide, encoder_layers=2, **sizes)
    assert count_parameters(build_detector(student, 10)) == 1_148_880
    assert count_parameters(build_detector(teacher, 10)) == 2_120_784
