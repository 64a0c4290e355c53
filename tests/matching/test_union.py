"""The union of matchings against loops over images and pairs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from d3etr.matching.assignment import Assignment
from d3etr.matching.union import given_assignment, shared_pairs

QUERIES, OBJECTS = 7, 4


def matching(layers: int, counts: tuple[int, ...], seed: int) -> Assignment:
    """Random pairs of few queries, so that matchings agree and disagree."""
    generator = torch.Generator().manual_seed(seed)
    slots = min(QUERIES, OBJECTS)
    rows = torch.zeros(2, layers, len(counts), slots, dtype=torch.int64)
    for layer in range(layers):
        for image, count in enumerate(counts):
            queries = torch.randperm(QUERIES, generator=generator)[:count].sort().values
            rows[0, layer, image, :count] = queries
            rows[1, layer, image, :count] = torch.randperm(count, generator=generator)
    valid = torch.arange(slots) < torch.tensor(counts)[:, None]
    return Assignment(rows[0], rows[1], counts, valid)


def slow_union(matchings: list[Assignment], image: int, count: int) -> dict[int, int]:
    votes: Counter[tuple[int, int]] = Counter()
    for one in matchings:
        for layer in range(len(one.rows)):
            rows, columns = (x[layer, image, :count].tolist() for x in (one.rows, one.columns))
            votes.update(zip(rows, columns, strict=True))
    objects: dict[int, int] = {}
    for (row, column), _ in sorted(votes.items(), key=lambda item: (-item[1], item[0])):
        objects.setdefault(row, column)
    return objects


def found_pairs(assignment: Assignment, image: int) -> dict[int, int]:
    used = assignment.valid_mask[image]
    rows, columns = (x[0, image][used].tolist() for x in (assignment.rows, assignment.columns))
    assert rows == sorted({*rows})
    return dict(zip(rows, columns, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_a_query_has_the_object_of_most_layers(seed: int) -> None:
    counts = (3, 0, 4, 1)
    matchings = [matching(3, counts, seed), matching(1, counts, seed + 100)]
    shared = shared_pairs(matchings, torch.tensor(counts), QUERIES, OBJECTS)
    for image, count in enumerate(counts):
        expected = slow_union(matchings, image, count)
        assert found_pairs(shared.assignment, image) == expected
        grown = len(expected) / count if count else 1.0
        assert shared.growth[image].item() == pytest.approx(grown)
        shrunk = (QUERIES - len(expected)) / (QUERIES - count)
        assert shared.shrinkage[image].item() == pytest.approx(shrunk)
        assert shared.weights[image].sum().item() == pytest.approx(count)
    unused = ~shared.assignment.valid_mask
    assert not shared.weights[unused].any()
    for part in (shared.assignment.rows, shared.assignment.columns):
        assert not part[0][unused].any()


def test_a_single_matching_is_its_own_union() -> None:
    counts = (2, 4, 0)
    own = matching(1, counts, 0)
    shared = shared_pairs([own, own], torch.tensor(counts), QUERIES, OBJECTS)
    for image, count in enumerate(counts):
        expected = dict(
            zip(*(x[0, image, :count].tolist() for x in (own.rows, own.columns)), strict=True)
        )
        assert found_pairs(shared.assignment, image) == expected
    assert torch.equal(shared.growth, torch.ones(3)) and torch.equal(
        shared.shrinkage, shared.growth
    )
    assert torch.equal(shared.weights, shared.assignment.valid_mask.float())


def test_without_objects_there_are_no_pairs() -> None:
    empty = torch.zeros(2, 3, 0, dtype=torch.int64)
    own = Assignment(empty, empty, (0, 0, 0), torch.zeros(3, 0, dtype=torch.bool))
    shared = shared_pairs([own], torch.zeros(3, dtype=torch.int64), QUERIES, 0)
    assert shared.assignment.rows.shape == (1, 3, 0)
    assert torch.equal(shared.growth, torch.ones(3))
    assert shared.of_layers(4).rows.shape == (4, 3, 0)


class _NoReads(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "unique_dim")
        return func(*args, **kwargs or {})


def test_the_host_reads_nothing() -> None:
    counts = (3, 0, 4, 1)
    own, objects = matching(2, counts, 0), torch.tensor(counts)
    with _NoReads():
        shared = shared_pairs([own], objects, QUERIES, OBJECTS)
        given_assignment(torch.full((4, QUERIES), -1), 3, ())
    with pytest.raises(AssertionError), _NoReads():
        shared.growth.sum().item()


@pytest.mark.parametrize("slots", [None, 3])
def test_given_pairs_come_first(slots: int | None) -> None:
    objects: Tensor = torch.tensor([[-1, 2, -1, 0, 2], [-1] * 5])
    found = given_assignment(objects, 2, slots=slots)
    assert found.rows[1, 0, :2].tolist() == [1, 3] and found.columns[0, 0, :2].tolist()[0] == 2
    assert found.rows.shape == (2, 2, slots or 5)
    assert found.valid_mask.sum(1).tolist() == [3, 0]
