"""Tokens at the places of another detector's queries, against a slow loop."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from d3etr.detectors.places import tokens_at_places
from d3etr.structures import Grids, Levels, Memory, ObjectQueries

WIDTH, IMAGES = 3, 2


def memory_of(levels: Levels, padding: Tensor | None = None) -> Memory:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in levels)
    values = torch.randn(IMAGES, tokens, WIDTH, generator=generator)
    return Memory(values, torch.zeros_like(values), padding, levels)


def group_of(place: Tensor | None, grids: Grids | None, count: int) -> ObjectQueries:
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(IMAGES, count, 4, generator=generator)
    return ObjectQueries(torch.zeros(IMAGES, count, 1), reference, None, place, grids)


def bilinear(memory: Memory, level: int, x: float, y: float, image: int) -> Tensor:
    begin = sum(h * w for h, w in memory.levels[:level])
    height, width = memory.levels[level]
    plane = memory.tokens[image, begin : begin + height * width].T.reshape(1, WIDTH, height, width)
    grid = torch.tensor([[[[2 * x - 1, 2 * y - 1]]]])
    return functional.grid_sample(plane, grid, padding_mode="border", align_corners=False).flatten()


def test_queries_of_the_same_grids_get_the_tokens_of_their_places() -> None:
    levels = ((4, 6), (2, 3))
    grids, memory = Grids(levels, (8, 16)), memory_of(levels)
    place = torch.stack([torch.randperm(30)[:9] for _ in range(IMAGES)])
    group = group_of(place, grids, 9)
    assert group.reference_logits is not None
    found = tokens_at_places(memory, grids, group, group.reference_logits)
    assert torch.equal(found, memory.tokens.gather(1, place[..., None].expand(-1, -1, WIDTH)))


@pytest.mark.parametrize("factor", [2, 3])
def test_a_teacher_that_sees_larger_pictures_meets_the_cell_below_its_centre(factor: int) -> None:
    """Same strides, so ``factor`` times as many cells along each side."""
    ours, theirs = ((4, 6), (2, 3)), ((4 * factor, 6 * factor), (2 * factor, 3 * factor))
    memory, count = memory_of(ours), 24 * factor**2 + 6 * factor**2
    place = torch.arange(count).expand(IMAGES, -1)
    group = group_of(place, Grids(theirs, (8, 16)), count)
    assert group.reference_logits is not None
    found = tokens_at_places(memory, Grids(ours, (8, 16)), group, group.reference_logits)
    expected = []
    for level, (height, width) in enumerate(theirs):
        for row in range(height):
            for column in range(width):
                begin = 24 * level
                own = begin + row // factor * ours[level][1] + column // factor
                expected.append(memory.tokens[:, own])
    assert torch.equal(found, torch.stack(expected, 1))


def test_without_a_level_of_that_stride_the_box_centre_counts() -> None:
    """Teacher of strides 4, 16 and 64, student of 8 and 16: only its 16 is met."""
    ours, theirs = ((4, 6), (2, 3)), ((8, 12), (2, 3), (1, 1))
    memory, count = memory_of(ours), 96 + 6 + 1
    place = torch.arange(count).expand(IMAGES, -1)
    group = group_of(place, Grids(theirs, (4, 16, 64)), count)
    assert group.reference_logits is not None
    found = tokens_at_places(memory, Grids(ours, (8, 16)), group, group.reference_logits)
    for image in range(IMAGES):
        for query in (0, 40, 95, 102):
            x, y = group.reference_logits[image, query, :2].sigmoid().tolist()
            expected = bilinear(memory, 0 if query < 96 else 1, x, y, image)
            torch.testing.assert_close(found[image, query], expected)
    assert torch.equal(found[:, 96:102], memory.tokens[:, 24:30])


def test_queries_of_no_token_get_the_mean_of_all_levels_within_the_image() -> None:
    levels = ((4, 6), (2, 3))
    padding = torch.zeros(IMAGES, 30, dtype=torch.bool)
    padding[1].view(-1)[:24].view(4, 6)[:, 3:] = True  # the right half of image 1
    padding[1].view(-1)[24:].view(2, 3)[:, 2:] = True
    memory, group = memory_of(levels, padding), group_of(None, None, 5)
    assert group.reference_logits is not None
    found = tokens_at_places(memory, Grids(levels, (8, 16)), group, group.reference_logits)
    for image, shares in enumerate([(1.0, 1.0), (3 / 6, 2 / 3)]):
        for query in range(5):
            x, y = group.reference_logits[image, query, :2].sigmoid().tolist()
            parts = [bilinear(memory, v, x * shares[v], y, image) for v in range(2)]
            torch.testing.assert_close(found[image, query], torch.stack(parts).mean(0))


def test_places_keep_their_digits_where_tokens_have_few() -> None:
    """A query between cells of a wide level has what bfloat16 tokens hold there, not beside it."""
    memory = memory_of(((2, 160),))
    memory = replace(memory, tokens=memory.tokens.bfloat16())
    group = group_of(None, None, 40)
    assert group.reference_logits is not None
    grids = Grids(memory.levels, (8,))
    found = tokens_at_places(memory, grids, group, group.reference_logits)
    precise = replace(memory, tokens=memory.tokens.float())
    expected = tokens_at_places(precise, grids, group, group.reference_logits)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 2.0**-7 * expected.norm()
