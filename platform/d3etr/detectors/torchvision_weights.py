"""Torchvision's weights as those of a backbone: what is taken, what is left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor

from d3etr.config.backbone import BackboneConfig
from d3etr.config.backbones import DINOV3, RESNET_VD, SMALL, TIMM, VIT
from d3etr.detectors.resnet_vd import with_first_shortcut
from d3etr.errors import UserError

CLASSIFIER = ("classifier.", "fc.", "head.")
"""How the names of what is left out begin; ConvNeXt's last norm is among them."""
COUNTER = "num_batches_tracked"
"""Of batch norm in training; left out too."""
_OLD_NAME = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.(\d)\.")
"""DenseNet's layers, as torchvision's files still name them."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of normalisation 'imagenet', for pixels in [0, 1]."""
_FIRST = ("features.0.0.weight", "features.0.1.running_mean")
"""Kernel of the first convolution, and what the norm after it takes away."""


def has_imagenet_weights(config: BackboneConfig) -> bool:
    """Whether anybody publishes ImageNet weights for a backbone; nothing is downloaded."""
    if config.name in (VIT, DINOV3, SMALL) or (config.has_batch_norm and config.norm == "group"):
        return False
    if not config.name.startswith(TIMM):
        return True
    import timm  # takes two seconds

    return bool(timm.is_model_pretrained(config.name.removeprefix(TIMM)))


def imagenet_weights(config: BackboneConfig) -> dict[str, Tensor]:
    """Torchvision's ImageNet weights of a backbone, by its own names.

    Of several, the first version's, as the official detectors start from; of the one network
    that has none (regnet_y_128gf), torchvision's default. A ResNet-vd's are timm's.

    Raises:
        UserError: there are none for this backbone, or they can't be downloaded.
    """
    if config.name in (VIT, DINOV3):
        kind = "RF-DETR" if config.name == VIT else "DEIMv2"
        raise UserError(
            f"backbone_weights 'imagenet' does not fit backbone '{config.name}', which has none: "
            "start from a whole detector by student.initialise_from ('d3etr import-weights' of an "
            f"{kind}), or give a file that 'd3etr pretrain-backbone' wrote"
        )
    if config.name == SMALL or (config.has_batch_norm and config.norm == "group"):
        raise UserError(
            f"backbone_weights 'imagenet' does not fit backbone '{config.name}' with norm "
            f"'{'group' if config.name == SMALL else config.norm}': torchvision has ImageNet "
            "weights for its own networks, with batch norm where they have it. Set backbone.norm "
            "to 'frozen' and the name of one of them, or give a file that 'd3etr "
            "pretrain-backbone' wrote."
        )
    if config.name in RESNET_VD:
        from d3etr.detectors import timm_weights  # importing timm takes two seconds

        theirs = timm_weights.imagenet_weights_of_timm(TIMM + config.name.replace("vd", "d"))
        return from_torchvision(config.name, theirs)
    weights = weights_of(config.name)
    try:
        tensors: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"backbone_weights 'imagenet': could not download {weights.url} ({error}). Download "
            f"it elsewhere and put it into {folder}, or set backbone_weights to the path of a "
            "file that 'd3etr pretrain-backbone' wrote."
        ) from error
    return from_torchvision(config.name, tensors)


def from_torchvision(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a torchvision network, or of timm's ResNet-D, as those of its backbone.

    Where torchvision's weights were trained with images normalised in another way
    (EfficientNetV2-L), the first convolution and the norm after it are changed so that ours give
    the same.

    Args:
        name: of the backbone.
        tensors: by torchvision's names, of its files or of its modules; by timm's of a ResNet-D,
            for a ResNet-vd.
    """
    kept = without_classifier(tensors)
    if name in RESNET_VD:
        return with_first_shortcut(name, kept)
    how = weights_of(name).transforms.keywords
    mean, std = how.get("mean", MEAN), how.get("std", STD)
    return kept if (mean, std) == (MEAN, STD) else kept | renormalised(kept, *_FIRST, mean, std)


def without_classifier(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to the backbone: all but the classifier and batch norm's counters."""
    return {
        _OLD_NAME.sub(r"\1\2.", key): tensor
        for key, tensor in tensors.items()
        if not key.startswith(CLASSIFIER) and not key.endswith(COUNTER)
    }


def weights_of(name: str) -> Any:
    """Torchvision's entry of a network's ImageNet weights: address, normalisation, size."""
    known = torchvision.models.get_model_weights(name)
    return known["IMAGENET1K_V1"] if "IMAGENET1K_V1" in known.__members__ else known.DEFAULT


def renormalised(
    tensors: Mapping[str, Tensor],
    kernel: str,
    average: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Tensor]:
    """First convolution and batch statistics for our normalisation in the place of another.

    Theirs is scale * ours + shift, so a kernel W gives scale * W on ours, plus sum(shift * W),
    which the running mean takes away. Only cells that see the border differ: zero is another
    colour there.
    """
    if not {kernel, average} <= set(tensors):
        return {}
    weight, added = renormalised_kernel(tensors[kernel], mean, std)
    return {kernel: weight, average: tensors[average] - added}


def renormalised_kernel(
    kernel: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """A first convolution's kernel for our normalisation, and what is added to its output.

    Args:
        kernel: [channels, 3, h, w], for pixels of the other normalisation.
        mean: of that.
        std: of that.

    Returns:
        [channels, 3, h, w] and [channels].
    """
    theirs, spread = torch.tensor(mean), torch.tensor(std)
    scale, shift = torch.tensor(STD) / spread, (torch.tensor(MEAN) - theirs) / spread
    return kernel * scale[:, None, None], (kernel * shift[:, None, None]).sum((1, 2, 3))
