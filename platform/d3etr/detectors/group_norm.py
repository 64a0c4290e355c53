"""Group normalisation that holds for feature maps of one token too."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """PyTorch's, without its refusal of a single value per group (an image of a few pixels).

    A single value is its own mean: it becomes the channel's bias.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, h, w] of the same, normalised over each image's groups of channels."""
        return torch.group_norm(maps, self.num_groups, self.weight, self.bias, self.eps)
