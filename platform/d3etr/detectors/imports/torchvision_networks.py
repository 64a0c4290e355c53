"""Which torchvision network a checkpoint is of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from d3etr.config.backbones import TORCHVISION
from d3etr.detectors.torchvision_backbone import build_network
from d3etr.detectors.torchvision_weights import weights_of, without_classifier

FIRST_NAMES = ("conv1.", "features.", "layers.", "stem.")
"""How the first tensor of torchvision's networks is called."""


def recognise(tensors: Mapping[str, Tensor]) -> str | None:
    """The network whose backbone has exactly these tensors, beside any classifier.

    Args:
        tensors: by torchvision's names.

    Returns:
        Torchvision's name, or None.
    """
    if not next(iter(tensors), "").startswith(FIRST_NAMES):
        return None
    size = sum(tensor.numel() for tensor in tensors.values())
    shapes = {name: tensor.shape for name, tensor in without_classifier(tensors).items()}
    nearest = sorted(TORCHVISION, key=lambda name: abs(_parameters(name) - size))
    return next((name for name in nearest if _shapes(name) == shapes), None)


def _parameters(name: str) -> int:
    """Of the whole network; only decides which one is tried first."""
    return int(weights_of(name).meta["num_params"])


def _shapes(name: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        whole = build_network(name).state_dict()
    return {name: tensor.shape for name, tensor in without_classifier(whole).items()}
