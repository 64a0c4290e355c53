import pytest
import torch
from torchvision.transforms.v2 import functional

from d3etr.data.augmentation import adjust_hue


def colours() -> torch.Tensor:
    """[3, 64, 512] every eighth value of each channel in all combinations, extremes included."""
    values = torch.arange(0, 256, 8, dtype=torch.uint8)
    values[-1] = 255
    grid = torch.cartesian_prod(values, values, values)
    return grid.T.reshape(3, 64, 512)


@pytest.mark.parametrize("shift", [0.0, 0.0173, -0.0871, 0.1, -0.1, 0.5, -0.5, 1e-9, -1e-9])
def test_hues_turn_as_torchvision_turns_them_to_the_last_bit(shift):
    pixels = colours()
    before = pixels.clone()
    assert torch.equal(adjust_hue(pixels, shift), functional.adjust_hue(pixels, shift))
    assert torch.equal(pixels, before)
