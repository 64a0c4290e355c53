"""Sine position encodings."""

from __future__ import annotations

import math

import torch

from d3etr.detectors.position import SineEncoding


def test_first_cell_has_the_formulas_values() -> None:
    encoded = SineEncoding(8).grid((4, 5), None)[0, 0]
    y, x = 2 * math.pi / 4, 2 * math.pi / 5
    expected = [
        f(v / 10_000 ** (2 * i / 4)) for v in (y, x) for i in (0, 1) for f in (math.sin, math.cos)
    ]
    torch.testing.assert_close(encoded, torch.tensor(expected), atol=1e-5, rtol=0)


def test_without_padding_equals_an_empty_mask() -> None:
    encoding = SineEncoding(32)
    shared = encoding.grid((5, 7), None)
    masked = encoding.grid((5, 7), torch.zeros(2, 5, 7, dtype=torch.bool))
    assert shared.shape == (1, 35, 32)
    torch.testing.assert_close(shared.expand(2, -1, -1), masked)


def test_a_padded_image_is_encoded_as_if_it_were_alone() -> None:
    encoding = SineEncoding(16)
    padding = torch.ones(1, 6, 8, dtype=torch.bool)
    padding[:, :4, :5] = False
    padded = encoding.grid((6, 8), padding).view(6, 8, 16)[:4, :5]
    torch.testing.assert_close(padded.reshape(1, 20, 16), encoding.grid((4, 5), None))


def test_a_point_is_encoded_like_the_cell_that_ends_there() -> None:
    encoding = SineEncoding(16)
    cells = encoding.grid((4, 8), None).view(4, 8, 16)
    point = encoding.points(torch.tensor([3 / 8, 2 / 4]))
    torch.testing.assert_close(point, cells[1, 2], atol=1e-5, rtol=0)
