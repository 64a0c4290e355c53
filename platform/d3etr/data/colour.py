"""Shifting an image's hue: torchvision's arithmetic, to the last bit, in a fraction of its time.

Choosing between values pixel by pixel, gathering and remainders take most of that time: the
compiled loops do them one at a time. Products with masks of zeros and ones are vectorised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

_SECTORS = 6


def adjust_hue(pixels: Tensor, shift: float) -> Tensor:
    """[3, h, w] uint8 of ``pixels`` [3, h, w] uint8, hues turned by ``shift`` turns."""
    hue, saturation, value = _hsv(functional.to_dtype(pixels, torch.float32, scale=True))
    hue.add_(shift)
    hue.sub_(hue.floor()).frac_()  # a hue just below 0 has been rounded to 1
    return _rgb(hue, saturation, value)


def _hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in turns, saturation and value [h, w] of RGB [3, h, w] in [0, 1]."""
    value, low = image.amax(0), image.amin(0)
    span, grey = value - low, (value == low).float()
    saturation = span / (value + grey)
    red, green, blue = (value - image).div_(span.add_(grey)).unbind()
    of_red, of_green = ((value == channel).float() for channel in image[:2])
    of_others = 1.0 - of_red
    of_blue = (1.0 - of_green).mul_(of_others)
    hue = (blue - green).mul_(of_red)
    hue.add_(red.add(2.0).sub_(blue).mul_(of_green.mul_(of_others)))
    hue.add_(green.add(4.0).sub_(red).mul_(of_blue))
    return hue.mul_(1.0 / _SECTORS).add_(1.0).frac_(), saturation, value


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """[3, h, w] uint8 of hue in turns, saturation and value [h, w]."""
    turned = hue.mul_(_SECTORS)
    sector = turned.floor()
    rising = turned.sub_(sector).mul_(saturation)
    lowest = 1.0 - saturation
    falling = (1.0 - rising).mul_(value).clamp_(0.0, 1.0)
    rising.add_(lowest).mul_(value).clamp_(0.0, 1.0)
    lowest.mul_(value).clamp_(0.0, 1.0)
    parts = [
        functional.to_dtype(part, torch.uint8, scale=True)
        for part in (value, falling, lowest, rising)
    ]
    places = sector.to(torch.uint8)
    within = [(places == number).view(torch.uint8) for number in range(_SECTORS)]
    return torch.stack([_channel(parts, within[-turn:] + within[:-turn]) for turn in (0, 4, 2)])


def _channel(parts: Sequence[Tensor], within: Sequence[Tensor]) -> Tensor:
    """From one sector to the next: value, falling, lowest twice, rising, value."""
    value, falling, lowest, rising = parts
    found = value * (within[0] + within[5])
    for part, mask in ((falling, within[1]), (rising, within[4])):
        found += part * mask
    found += lowest * (within[2] + within[3])
    return found
