"""Detections compared as sets, and the gathers that stand for bilinear samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d3etr.detectors.deformable_attention import Samples, sample_values
from d3etr.errors import UserError
from d3etr.exports.comparison import Detected, compare
from d3etr.exports.description import Description
from d3etr.exports.gathers import gather_bilinear


def detected(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detected:
    return Detected(
        np.array([boxes], dtype=np.float32),
        np.array([scores], dtype=np.float32),
        np.array([labels], dtype=np.int64),
    )


ONE, OTHER, FAR = [0.0, 0, 10, 10], [20.0, 20, 40, 40], [50.0, 50, 60, 60]
SIZE = [(100, 100)]


def test_the_order_of_equal_scores_does_not_matter() -> None:
    first = detected([ONE, OTHER], [0.5, 0.5], [0, 1])
    second = detected([OTHER, ONE], [0.50001, 0.5], [1, 0])
    found = compare(first, second, SIZE)
    assert found.equal and found.detections == 2 and found.score_difference < 2e-5


@pytest.mark.parametrize(
    "other",
    [
        detected([ONE, [20.0, 20, 40, 40.02]], [0.5, 0.4], [0, 1]),
        detected([ONE, OTHER], [0.5, 0.402], [0, 1]),
        detected([ONE, OTHER], [0.5, 0.4], [0, 0]),
        detected([FAR, OTHER], [0.5, 0.4], [0, 1]),
        detected([ONE, OTHER, FAR], [0.5, 0.4, 0.1], [0, 1, 1]),
        detected([ONE, [np.nan] * 4], [0.5, 0.4], [0, 1]),
    ],
    ids=["box", "score", "label", "another", "more", "nan"],
)
def test_another_detection_is_a_difference(other: Detected) -> None:
    assert not compare(detected([ONE, OTHER], [0.5, 0.4], [0, 1]), other, SIZE).equal


def test_a_near_tie_at_the_last_place_is_counted_and_allowed() -> None:
    first = detected([ONE, OTHER, FAR], [0.5, 0.40001, 0.4], [0, 1, 1])
    second = detected([ONE, FAR], [0.5, 0.4], [0, 1])
    found = compare(first, second, SIZE)
    assert found.equal and found.near_ties == 1 and "near-ties" in str(found)
    clear = detected([ONE, OTHER, FAR], [0.5, 0.4009, 0.4], [0, 1, 1])
    assert not compare(clear, second, SIZE).equal


@pytest.mark.parametrize("counts", [None, (3, 2)])
def test_gathers_are_bilinear_samples(counts: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    levels = ((5, 7), (3, 2))
    value = torch.randn(2, 41, 8)
    places = torch.rand(2, 6, 2, 2, 3, 2) * 1.4 - 0.2  # also outside, and on edges of cells
    places[0, 0] = torch.tensor([0.0, 1.0])
    samples = Samples(places, torch.rand(2, 6, 2, 2, 3), counts)
    wanted = sample_values(value, samples, levels)
    assert torch.allclose(gather_bilinear(value, samples, levels), wanted, atol=1e-5)


def test_foreign_and_broken_metadata_are_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"has no 'd3etr\.version'"):
        Description.from_metadata({"names": "[]"}, "x.onnx")
    with pytest.raises(UserError, match="an export of version 7, but this d3etr reads version 1"):
        Description.from_metadata({"d3etr.version": '"7"'}, "x.onnx")
    with pytest.raises(UserError, match="metadata of d3etr is broken"):
        Description.from_metadata({"d3etr.version": '"1"', "d3etr.names": "["}, "x.onnx")
