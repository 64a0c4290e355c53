"""Timm's weights, and files with the names of EfficientNet-Lite's PyTorch port, as a backbone's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from d3etr.config.backbones import is_timm_vit
from d3etr.detectors.backbones import Backbone
from d3etr.detectors.timm_backbone import build_timm
from d3etr.detectors.timm_vit import build_timm_vit
from d3etr.detectors.torchvision_weights import MEAN, STD, renormalised, renormalised_kernel
from d3etr.errors import UserError

INNER = "network."
"""Beginning of our names; timm's own follow."""
LITE = "tf_efficientnet_lite"
"""Beginning of timm's names of EfficientNet-Lite with TensorFlow's padding, as its port has."""
_LITE_MEAN, _LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
"""What EfficientNet-Lite was trained with: pixels (x - 127) / 128."""
_LITE_BLOCK = re.compile(r"_blocks\.(\d+)\._(\w+)\.(\w+)")
_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
_PLAIN = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
"""Layers of a block without expansion: the port's names -> timm's."""
_WIDENED = {
    **{"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2"},
    **{"project_conv": "conv_pwl", "bn2": "bn3"},
}
"""Layers of a block with expansion."""


def imagenet_weights_of_timm(name: str) -> dict[str, Tensor]:
    """Timm's default weights of a network, by timm's names, for our normalisation.

    Raises:
        UserError: they cannot be had.
    """
    build = build_timm_vit if is_timm_vit(name) else build_timm
    try:
        network = build(name, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # the hub's client has dozens of its own
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"backbone_weights 'imagenet': could not get timm's weights of {name} ({first}). "
            "Download their file elsewhere and set backbone_weights to its path"
        ) from error
    return _for_our_pixels(network.state_dict(), *_pixels(network), network)


def from_timm(
    backbone: Backbone, tensors: Mapping[str, Tensor], *, for_our_pixels: bool = False
) -> dict[str, Tensor]:
    """Tensors of a file by our names; what a backbone has no use for is left out.

    Args:
        backbone: that starts from them.
        tensors: by our names, timm's, or those of EfficientNet-Lite's PyTorch port.
        for_our_pixels: timm's are for our normalisation already, not for that of the network.

    Raises:
        UserError: the port's, for another network.
    """
    if all(name.startswith(INNER) for name in tensors):
        return dict(tensors)
    network: Any = backbone.get_submodule("network")
    if "_conv_stem.weight" in tensors:
        tensors = _from_lite(backbone, tensors)
        tensors = _for_our_pixels(tensors, _LITE_MEAN, _LITE_STD, network)
    elif not for_our_pixels:
        tensors = _for_our_pixels(tensors, *_pixels(network), network)
    kept = set(backbone.state_dict())
    return {INNER + name: x for name, x in tensors.items() if INNER + name in kept}


def _pixels(network: Any) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the pixels that timm's weights were trained with."""
    how: Mapping[str, Any] = network.pretrained_cfg
    return how["mean"], how["std"]


def _for_our_pixels(
    tensors: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float], network: Any
) -> dict[str, Tensor]:
    """With the first convolution changed for pixels of normalisation ``imagenet``.

    Args:
        tensors: by timm's names.
        mean: of the pixels that they were trained with.
        std: likewise.
        network: timm's.

    Raises:
        UserError: nothing behind the convolution takes up the other mean.
    """
    if (tuple(mean), tuple(std)) == (MEAN, STD):
        return dict(tensors)
    modules = [name for name, _ in network.named_modules()]  # a file's order may be another
    kernels = (f"{name}.weight" for name in modules)
    kernel = next(name for name in kernels if name in tensors and tensors[name].dim() == 4)
    averages = (f"{name}.running_mean" for name in modules)
    average = next((name for name in averages if name in tensors), None)
    bias = kernel.removesuffix("weight") + "bias"
    if bias not in tensors and average is not None:
        return {**tensors, **renormalised(tensors, kernel, average, mean, std)}
    scaled, added = renormalised_kernel(tensors[kernel], mean, std)
    changed = {**tensors, kernel: scaled}
    if bias in tensors:
        changed[bias] = tensors[bias] + added
    elif "pos_embed" in tensors and isinstance(network.patch_embed.norm, nn.Identity):  # CLIP's
        positions = tensors["pos_embed"].clone()  # those of patches come last
        positions[:, -network.patch_embed.num_patches :] += added
        changed["pos_embed"] = positions
    else:
        raise UserError(
            "backbone_weights: the network was trained with pixels of another normalisation, "
            f"mean {tuple(mean)} and std {tuple(std)}, and has no bias that could make up for it"
        )
    return changed


def _from_lite(backbone: Backbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Timm's names of the port's tensors: its blocks are numbered through."""
    if not backbone.config.name.startswith(f"timm/{LITE}"):
        raise UserError(
            "backbone_weights: the file has the names of EfficientNet-Lite's PyTorch port, which "
            f"pads as TensorFlow does; found backbone {backbone.config.name}, expected "
            f"timm/{LITE}0 to 4"
        )
    stages: Any = backbone.get_submodule("network.blocks")
    places = [f"blocks.{i}.{j}" for i, stage in enumerate(stages) for j in range(len(stage))]
    widened = {k for k in range(len(places)) if f"_blocks.{k}._expand_conv.weight" in tensors}
    found = {}
    for name, tensor in tensors.items():
        match = _LITE_BLOCK.fullmatch(name)
        if match is None:
            layer, _, rest = name.partition(".")
            if layer in _STEM:  # the rest is its head
                found[f"{_STEM[layer]}.{rest}"] = tensor
            continue
        block, layer = int(match[1]), match[2]
        names = _WIDENED if block in widened else _PLAIN
        found[f"{places[block]}.{names[layer]}.{match[3]}"] = tensor
    return found
