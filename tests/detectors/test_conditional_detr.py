"""Conditional DETR: groups, padding, attention on request, gradients, precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d3etr.config.detector import BackboneConfig, DetectorConfig
from d3etr.detectors.build import DETECTORS, build_detector, count_parameters
from d3etr.detectors.conditional_detr import ConditionalDETR
from d3etr.structures import (
    MASKED_SCORE,
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


def _group(count: int, width: int = 32, images: int | None = None) -> ObjectQueries:
    torch.manual_seed(count)
    shape = (count,) if images is None else (images, count)
    return ObjectQueries(torch.randn(*shape, width), torch.randn(*shape, 2))


def _assert_same(one: DecoderOutputs, other: DecoderOutputs, tolerance: float = 1e-5) -> None:
    for name in ("logits", "boxes_cxcywh", "self_attention_scores", "cross_attention_scores"):
        a, b = getattr(one, name), getattr(other, name)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_keeps_the_contract(name: str, tiny_config: DetectorConfig) -> None:
    detector = build_detector(tiny_config.model_copy(update={"name": name}), 5).eval()
    memory = detector.encode(_images())
    (outputs,) = detector.decode(memory, [detector.object_queries()], attention=True)
    assert memory.grid == outputs.grid == (4, 6)
    assert memory.tokens.shape == (3, 24, 32)
    assert outputs.logits.shape == (3, 3, 6, 5)
    assert outputs.boxes_cxcywh.shape == (3, 3, 6, 4)
    assert outputs.self_attention.shape == (3, 3, 4, 6, 6)
    assert outputs.cross_attention.shape == (3, 3, 4, 6, 24)
    assert detector.stride == 8
    assert detector.classes == 5
    assert outputs.padding is memory.padding is not None
    assert outputs.boxes_cxcywh.min() >= 0
    assert outputs.boxes_cxcywh.max() <= 1


@pytest.mark.parametrize("attention", [False, True])
@torch.no_grad()
def test_groups_decoded_together_equal_groups_decoded_apart(
    tiny_detector: ConditionalDETR, attention: bool
) -> None:
    memory = tiny_detector.encode(_images())
    groups = [tiny_detector.object_queries(), _group(4), _group(9), _group(5, images=3)]
    together = tiny_detector.decode(memory, groups, attention=attention)
    assert [outputs.queries for outputs in together] == [6, 4, 9, 5]
    for group, outputs in zip(groups, together, strict=True):
        (apart,) = tiny_detector.decode(memory, [group], attention=attention)
        _assert_same(outputs, apart)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_asking_for_attention_changes_nothing_else(
    tiny_detector: ConditionalDETR, padded: bool
) -> None:
    memory = tiny_detector.encode(_images(padded))
    groups = [tiny_detector.object_queries(), _group(4)]
    plain = tiny_detector.decode(memory, groups)
    asked = tiny_detector.decode(memory, groups, attention=True)
    for one, other in zip(plain, asked, strict=True):
        assert one.self_attention_scores is None
        assert one.cross_attention_scores is None
        _assert_same(one, other)


@torch.no_grad()
def test_queries_of_each_image_equal_shared_queries(tiny_detector: ConditionalDETR) -> None:
    memory = tiny_detector.encode(_images())
    shared = _group(4)
    assert shared.reference_logits is not None
    own = ObjectQueries(
        shared.embedding.expand(3, -1, -1), shared.reference_logits.expand(3, -1, -1)
    )
    (one,), (other,) = (tiny_detector.decode(memory, [g], attention=True) for g in (shared, own))
    _assert_same(one, other)


@torch.no_grad()
def test_a_groups_own_reference_points_are_used(tiny_detector: ConditionalDETR) -> None:
    memory = tiny_detector.encode(_images())
    group = _group(4)
    assert group.reference_logits is not None
    moved = ObjectQueries(group.embedding, group.reference_logits + 1)
    (before,), (after,) = (tiny_detector.decode(memory, [g]) for g in (group, moved))
    shift = after.boxes_cxcywh.logit() - before.boxes_cxcywh.logit()
    assert (shift[..., :2].mean() - 1).abs() < 0.2
    (derived,) = tiny_detector.decode(memory, [ObjectQueries(group.embedding)])
    assert not torch.allclose(derived.boxes_cxcywh, before.boxes_cxcywh)


@torch.no_grad()
def test_queries_without_reference_points_get_the_detectors(
    tiny_detector: ConditionalDETR,
) -> None:
    memory = tiny_detector.encode(_images())
    own = tiny_detector.object_queries()
    (one,), (other,) = (
        tiny_detector.decode(memory, [group]) for group in (own, ObjectQueries(own.embedding))
    )
    _assert_same(one, other)


def test_anchor_boxes_are_refused(tiny_detector: ConditionalDETR) -> None:
    memory = tiny_detector.encode(_images())
    with pytest.raises(ValueError, match="reference points"):
        tiny_detector.decode(memory, [ObjectQueries(torch.zeros(2, 32), torch.zeros(2, 4))])


@torch.no_grad()
def test_a_batch_equals_its_images_one_by_one(tiny_detector: ConditionalDETR) -> None:
    images = _images(padded=False)
    queries = [tiny_detector.object_queries()]
    (together,) = tiny_detector.decode(tiny_detector.encode(images), queries, attention=True)
    for index in range(3):
        alone = tiny_detector.encode(ImageBatch(images.pixels[index : index + 1]))
        (outputs,) = tiny_detector.decode(alone, queries, attention=True)
        torch.testing.assert_close(
            outputs.logits[:, 0], together.logits[:, index], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            outputs.cross_attention[:, 0], together.cross_attention[:, index], atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_padding_is_invisible_behind_the_backbone(tiny_detector: ConditionalDETR) -> None:
    """Backbones see padding's edge, as in DETR; encoder and decoder must not."""
    features = torch.randn(1, 16, 3, 4)
    padded = torch.randn(1, 16, 5, 6)
    padded[..., :3, :4] = features
    padding = torch.ones(1, 40, 48, dtype=torch.bool)
    padding[:, :24, :32] = False
    queries = [tiny_detector.object_queries()]
    (alone,), (beside,) = (
        tiny_detector.decode(tiny_detector.encode_features(*inputs), queries, attention=True)
        for inputs in ((features, None), (padded, padding))
    )
    torch.testing.assert_close(alone.logits, beside.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone.boxes_cxcywh, beside.boxes_cxcywh, atol=1e-5, rtol=1e-5)
    maps = beside.cross_attention.unflatten(-1, (5, 6))
    torch.testing.assert_close(
        alone.cross_attention.unflatten(-1, (3, 4)), maps[..., :3, :4], atol=1e-5, rtol=0
    )
    assert maps[..., 3:, :].max() == 0
    assert maps[..., 4:].max() == 0
    assert (beside.cross_attention_scores == MASKED_SCORE).any()


def test_gradients_reach_every_parameter(tiny_detector: ConditionalDETR) -> None:
    tiny_detector.train()
    (outputs,) = tiny_detector.decode(
        tiny_detector.encode(_images()), [tiny_detector.object_queries()], attention=True
    )
    loss = outputs.logits.square().sum() + outputs.boxes_cxcywh.square().sum()
    (loss + outputs.cross_attention.square().sum()).backward()
    for name, parameter in tiny_detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_queries_of_one_group_do_not_reach_another(tiny_detector: ConditionalDETR) -> None:
    memory = tiny_detector.encode(_images())
    auxiliary = ObjectQueries(torch.randn(4, 32, requires_grad=True), torch.randn(4, 2))
    main, _ = tiny_detector.decode(memory, [tiny_detector.object_queries(), auxiliary])
    (gradient,) = torch.autograd.grad(
        main.logits.sum(), [auxiliary.embedding], allow_unused=True, materialize_grads=True
    )
    assert gradient.abs().max() == 0


def test_dropout_tells_images_apart_in_training_only(tiny_detector: ConditionalDETR) -> None:
    torch.manual_seed(0)
    memory = tiny_detector.encode(ImageBatch(torch.randn(1, 3, 32, 32).expand(2, -1, -1, -1)))
    assert torch.allclose(memory.tokens[0], memory.tokens[1], atol=1e-5)
    queries = [tiny_detector.object_queries()]

    def first_layer_difference() -> Tensor:
        (outputs,) = tiny_detector.decode(memory, queries)
        return (outputs.logits[0, 0] - outputs.logits[0, 1]).abs().max()

    assert first_layer_difference() < 1e-5
    tiny_detector.train()
    assert first_layer_difference() > 1e-3


@pytest.mark.parametrize("attention", [False, True])
def test_bfloat16_autocast_keeps_boxes_and_scores_in_float32(
    tiny_detector: ConditionalDETR, attention: bool
) -> None:
    images, queries = _images(), [tiny_detector.object_queries()]
    with torch.no_grad():
        (exact,) = tiny_detector.decode(tiny_detector.encode(images), queries)
    with torch.autocast("cpu", torch.bfloat16):
        memory = tiny_detector.encode(images)
        (outputs,) = tiny_detector.decode(memory, queries, attention=attention)
    assert outputs.boxes_cxcywh.dtype == outputs.logits.dtype == torch.float32
    assert (outputs.boxes_cxcywh - exact.boxes_cxcywh).abs().mean() < 0.02
    outputs.logits.sum().backward()
    if attention:
        assert outputs.cross_attention_scores is not None
        assert outputs.cross_attention_scores.dtype == torch.float32


@pytest.mark.slow
@torch.no_grad()
def test_compiles_as_one_graph(tiny_detector: ConditionalDETR) -> None:
    images, queries = _images(), [tiny_detector.object_queries(), _group(4)]
    encode = torch.compile(tiny_detector.encode, backend="eager", fullgraph=True)
    decode = torch.compile(tiny_detector.decode, backend="eager", fullgraph=True)
    memory = encode(images)
    assert isinstance(memory, Memory)
    compiled = decode(memory, queries, attention=True)
    for one, other in zip(
        compiled, tiny_detector.decode(memory, queries, attention=True), strict=True
    ):
        _assert_same(one, other)


def test_starts_at_the_prior_probability_and_the_configured_box_size(
    tiny_config: DetectorConfig,
) -> None:
    detector = build_detector(tiny_config, 5).eval()
    (outputs,) = detector.decode(detector.encode(_images()), [detector.object_queries()])
    size = torch.tensor(-1.4).sigmoid()
    assert 0.002 < outputs.logits.sigmoid().mean() < 0.05
    torch.testing.assert_close(outputs.boxes_cxcywh[..., 2:].mean(), size)
    reference = detector.object_queries().reference_logits
    assert reference is not None
    expected = reference.sigmoid().expand(3, 3, -1, -1)
    torch.testing.assert_close(outputs.boxes_cxcywh[..., :2], expected)


def test_an_encoder_without_layers_passes_tokens_on(tiny_config: DetectorConfig) -> None:
    detector = build_detector(tiny_config.model_copy(update={"encoder_layers": 0}), 5).eval()
    assert detector.encode(_images()).tokens.shape == (3, 24, 32)


def test_the_benchmarks_detectors_have_the_published_sizes() -> None:
    sizes = {"width": 128, "feedforward": 256, "queries": 16, "decoder_layers": 3}
    student = DetectorConfig(backbone=BackboneConfig(name="small"), encoder_layers=1, **sizes)
    wide = BackboneConfig(name="small", stem_width=32, stage_widths=(48, 96, 128), stage_blocks=2)
    teacher = DetectorConfig(backbone=wide, encoder_layers=2, **sizes)
    assert count_parameters(build_detector(student, 10)) == 1_148_880
    assert count_parameters(build_detector(teacher, 10)) == 2_120_784
