"""Pixels are the same with and without PyTorch."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from d3etr.config.data import PreprocessingConfig
from d3etr.data.preprocessing import normalise_pixels, resize_pixels
from d3etr.data.transforms import normalise


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((427, 640), (800, 1199)),
        ((400, 560), (64, 64)),
        ((100, 60), (33, 17)),
        ((5, 7), (50, 3)),
        ((64, 64), (64, 100)),
        ((1, 9), (4, 4)),
        ((900, 31), (40, 31)),
    ],
)
def test_resizing_rounds_as_torchvision_does(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    if torch.backends.cpu.get_cpu_capability() not in {"AVX2", "AVX512"}:
        pytest.skip("there, torchvision resizes in floating point")
    pixels = np.random.default_rng(0).integers(0, 256, (*before, 3), dtype=np.uint8)
    theirs = functional.resize(torch.from_numpy(pixels).permute(2, 0, 1), [*after], antialias=True)
    assert np.array_equal(resize_pixels(pixels, after), theirs.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("how", ["imagenet", "per_image", "unit"])
def test_normalised_pixels_are_the_same(how: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 56), dtype=np.uint8)
    config = PreprocessingConfig(normalisation=how)  # type: ignore[arg-type]
    wanted = normalise(torch.from_numpy(pixels), config).numpy()
    np.testing.assert_allclose(normalise_pixels(pixels, how), wanted, atol=2e-6)
    flat = np.full((3, 5, 5), 7, dtype=np.uint8)
    assert np.isfinite(normalise_pixels(flat, how)).all()
