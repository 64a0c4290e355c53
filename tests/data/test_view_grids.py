"""What is stored on an image's own grids comes back on those of any batch."""

import numpy as np

from d3etr.data.view_grids import batch_tokens, moved_locations, moved_tokens, own_tokens

OWN = ((3, 5), (2, 3))
BATCH = ((4, 6), (2, 4))
WIDER = ((7, 5), (4, 3))


def number(level: int, row: int, column: int, levels: tuple[tuple[int, int], ...]) -> int:
    """A token's number, counted one by one."""
    found = 0
    for index, (height, width) in enumerate(levels):
        for r in range(height):
            for c in range(width):
                if (index, r, c) == (level, row, column):
                    return found
                found += 1
    raise AssertionError


CELLS = [(level, r, c) for level, (h, w) in enumerate(OWN) for r in range(h) for c in range(w)]


def test_tokens_keep_their_cells() -> None:
    values = np.arange(32 * 2).reshape(32, 2)
    own = own_tokens(values, BATCH, OWN)
    [back] = batch_tokens([own], [OWN], WIDER)
    for cell, token in zip(CELLS, own, strict=True):
        assert (token == values[number(*cell, BATCH)]).all()
        assert (back[number(*cell, WIDER)] == token).all()
    assert (back != 0).any(1).sum() == len(CELLS)
    assert back.shape == (35 + 12, 2)


def test_numbers_of_tokens_are_those_of_their_cells() -> None:
    there = np.array([number(*cell, BATCH) for cell in CELLS])
    own = moved_tokens(there, BATCH, OWN)
    assert own.tolist() == list(range(len(CELLS)))
    assert moved_tokens(own, OWN, WIDER).tolist() == [number(*cell, WIDER) for cell in CELLS]


def test_locations_stay_at_their_cells() -> None:
    places = np.random.default_rng(0).random((4, 2, 3, 2), dtype=np.float32)
    moved = moved_locations(places, BATCH, OWN)
    for level, ((height, width), (h, w)) in enumerate(zip(BATCH, OWN, strict=True)):
        cells = places[:, level] * [width, height]
        np.testing.assert_allclose(moved[:, level] * [w, h], cells, rtol=1e-6)
    np.testing.assert_allclose(moved_locations(moved, OWN, BATCH), places, rtol=1e-6)
