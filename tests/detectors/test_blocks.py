"""Groups whose queries come in blocks: what they see, and that nobody sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from tiny import FAMILY, tiny_detector_config
from torch import Tensor, nn
from torch.nn import functional

from d3etr.detectors.attention import (
    ConditionalSelfAttention,
    MultiHeadAttention,
    SelfAttention,
    attend_in_blocks,
)
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.groups import GroupSize, sizes_of
from d3etr.structures import ImageBatch, Memory, ObjectQueries

MAIN, BLOCKS, EACH, OTHER = 5, 3, 4, 2
SIZES = [GroupSize(MAIN), GroupSize(BLOCKS * EACH, BLOCKS), GroupSize(OTHER)]


def hidden_from() -> Tensor:
    """[N, N] bool, True where a query of ``SIZES`` must not see another; query by query."""
    groups = [0] * MAIN + [1] * (BLOCKS * EACH) + [2] * OTHER
    blocks = [0] * MAIN + [n // EACH for n in range(BLOCKS * EACH)] + [0] * OTHER
    mask = torch.ones(len(groups), len(groups), dtype=torch.bool)
    for i, (group, block) in enumerate(zip(groups, blocks, strict=True)):
        for j, (other, their_block) in enumerate(zip(groups, blocks, strict=True)):
            same = group == other and block == their_block
            mask[i, j] = not (same or (group == 1 and other == 0))
    return mask


def test_one_softmax_equals_attention_under_a_dense_mask() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, MAIN + BLOCKS * EACH, 8, requires_grad=True) for _ in range(3)]
    rest = [x[:, :, MAIN:] for x in parts]
    shared = parts[1][:, :, :MAIN], parts[2][:, :, :MAIN]
    ours, _ = attend_in_blocks(rest[0], rest[1], rest[2], shared, BLOCKS, 0.0)
    visible = ~hidden_from()[: MAIN + BLOCKS * EACH, : MAIN + BLOCKS * EACH]
    dense = functional.scaled_dot_product_attention(*parts, attn_mask=visible)
    theirs = dense.transpose(1, 2).flatten(2)[:, MAIN:]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((x * weight).sum(), parts) for x in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def dense_within(
    self: MultiHeadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: list[GroupSize],
    padding: Tensor | None,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """``within`` of all groups at once under one mask; encoders have one group."""
    heads = [self.split(x) for x in (query, key, value.expand(query.shape))]
    mask = ~hidden_from() if len(sizes) > 1 else None
    if padding is not None:
        mask = ~padding[:, None, None]
    mixed = functional.scaled_dot_product_attention(*heads, attn_mask=mask)
    return self.output(mixed.transpose(1, 2).flatten(2)), []


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Makes all attention within groups dense."""
    return lambda: monkeypatch.setattr(MultiHeadAttention, "within", dense_within)


@pytest.mark.parametrize("kind", [SelfAttention, ConditionalSelfAttention])
def test_attention_modules_take_blocks(kind: type[nn.Module], dense: Callable[[], None]) -> None:
    torch.manual_seed(0)
    module = kind(tiny_detector_config(width=16, heads=2))
    states, embedding = torch.randn(2, 2, sum(size.queries for size in SIZES), 16)
    states.requires_grad_(True)

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        mixed, kept = module(states, embedding, sizes=SIZES, keep=False)
        assert kept == []
        return mixed, torch.autograd.grad(mixed.square().sum(), [states, *module.parameters()])

    ours = run()
    dense()
    torch.testing.assert_close(ours, run(), atol=1e-6, rtol=1e-5)


def some_queries(detector: DetectionTransformer, count: int, images: int) -> ObjectQueries:
    """Random queries of each image, as a detector's kind takes them."""
    config = detector.config
    size = config.reference_size
    return ObjectQueries(
        torch.randn(images, count, config.width),
        torch.randn(images, count, size) if size else None,
        torch.randn(images, count, config.width) if config.takes_content else None,
    )


def _groups(detector: DetectionTransformer, memory: Memory) -> list[ObjectQueries]:
    torch.manual_seed(5)
    images = len(memory.tokens)
    blocks = replace(some_queries(detector, BLOCKS * EACH, images), blocks=BLOCKS)
    main = detector.object_queries(memory)
    return [main, blocks, some_queries(detector, OTHER, images)]


@pytest.fixture(params=FAMILY)
def detector(request: pytest.FixtureRequest) -> DetectionTransformer:
    """Each detector of the family with ``MAIN`` queries of its own."""
    from d3etr.detectors.build import build_detector

    torch.manual_seed(0)
    sizes = {"width": 32, "heads": 4, "queries": MAIN}
    built = build_detector(tiny_detector_config(**sizes, **FAMILY[request.param]), 3).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "head" in name or "query" in name:
                parameter.normal_(std=0.2)
    return built


@pytest.fixture
def batch() -> ImageBatch:
    """Two images, one of them padded."""
    generator = torch.Generator().manual_seed(3)
    padding = torch.zeros(2, 32, 40, dtype=torch.bool)
    padding[1, :, 24:] = True
    pixels = torch.randn(2, 3, 32, 40, generator=generator)
    return ImageBatch(pixels.masked_fill(padding[:, None], 0.0), padding)


def test_every_detector_decodes_blocks(
    detector: DetectionTransformer, batch: ImageBatch, dense: Callable[[], None]
) -> None:
    memory = detector.encode(batch)
    groups = _groups(detector, memory)
    ours = detector.decode(memory, groups)
    alone = detector.decode(memory, [groups[0], groups[2]])
    for with_blocks, without in zip((ours[0], ours[2]), alone, strict=True):
        torch.testing.assert_close(with_blocks.logits, without.logits, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            with_blocks.boxes_cxcywh, without.boxes_cxcywh, atol=1e-6, rtol=1e-5
        )
    dense()
    for mine, other in zip(ours, detector.decode(memory, groups), strict=True):
        torch.testing.assert_close(mine.logits, other.logits, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(mine.boxes_cxcywh, other.boxes_cxcywh, atol=2e-6, rtol=1e-5)


def test_blocks_do_not_see_each_other_and_do_see_the_first_group(
    detector: DetectionTransformer, batch: ImageBatch
) -> None:
    memory = detector.encode(batch)
    groups = _groups(detector, memory)

    def first_block(*, nudged: int | None, main: float = 0.0) -> Tensor:
        own, blocks, other = groups
        if nudged is not None:
            shift = torch.zeros(BLOCKS * EACH, 1)
            shift[nudged * EACH : (nudged + 1) * EACH] = 0.7
            blocks = replace(blocks.map(lambda x: x + shift), blocks=BLOCKS)
        own = own.map(lambda x: x + main)
        return detector.decode(memory, [own, blocks, other])[1].logits[:, :, :EACH]

    plain = first_block(nudged=None)
    assert torch.allclose(plain, first_block(nudged=1), atol=1e-6)
    assert not torch.allclose(plain, first_block(nudged=0), atol=1e-4)
    assert not torch.allclose(plain, first_block(nudged=None, main=0.7), atol=1e-6)


def test_groups_with_blocks_have_no_maps(detector: DetectionTransformer, batch: ImageBatch) -> None:
    memory = detector.encode(batch)
    groups = _groups(detector, memory)
    kept = detector.decode(memory, groups, attention=True)
    alone = detector.decode(memory, [groups[0], groups[2]], attention=True)
    assert kept[1].self_maps is None and kept[1].cross_maps is None
    for mine, other in zip((kept[0], kept[2]), alone, strict=True):
        torch.testing.assert_close(mine.self_attention, other.self_attention)
        torch.testing.assert_close(mine.cross_attention, other.cross_attention)


def test_blocks_are_equal_and_never_first() -> None:
    queries = ObjectQueries(torch.zeros(6, 8), blocks=3)
    with pytest.raises(ValueError, match="6 queries in 3 blocks as group 0 of 1"):
        sizes_of([queries])
    with pytest.raises(ValueError, match="6 queries in 4 blocks as group 1 of 2"):
        sizes_of([replace(queries, blocks=0), replace(queries, blocks=4)])
    assert queries.detach().blocks == 3
