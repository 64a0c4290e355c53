"""Timm's networks as backbones, by ``timm/NAME``: maps of their stages from stride 4 on.

Shapes: B images · h, w cells of a stage's map.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, freeze_batch_norm_2d
from timm.models.hgnet import HighPerfGpuNet
from torch import Tensor, nn
from torch.nn import functional

from d3etr.config.backbone import BackboneConfig
from d3etr.config.backbones import TIMM
from d3etr.detectors.batch_norm import BatchNorm2d
from d3etr.detectors.small_backbone import GroupNorm
from d3etr.detectors.torchvision_backbone import FIRST_STRIDE, group_norm, replace_batch_norm
from d3etr.errors import UserError

ROUNDING_UP = (HighPerfGpuNet,)
"""Networks that see images as they are; what they would make of zeros around them is not zero."""


class TimmBackbone(nn.Module):
    """A network of timm without what comes after its last map; weight names are timm's.

    Maps are ceil(size / stride) large: images are padded with zeros to a multiple of the stride,
    as images in a batch are. HGNets round up by themselves and see no such zeros, as in the code of
    D-FINE and in transformers.

    Args:
        config: uses name, norm and frozen_stages.

    Attributes:
        config: what it was built from.
        channels: channels of the output.
        stride: pixels per output cell.
        stage_channels: channels of each stage's output.
        stage_strides: pixels per cell of each stage's output, from 4 on.

    Raises:
        UserError: timm has no such network, or none with maps of several resolutions.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.network = build_timm(config.name)
        stages = self._stages()
        self.stage_strides = tuple(stages)
        self.stage_channels = tuple(info["num_chs"] for _, info in stages.values())
        self.channels, self.stride = self.stage_channels[-1], self.stage_strides[-1]
        indices = [index for index, _ in stages.values()]
        finer = [x["module"] for x in self.network.feature_info if x["reduction"] < FIRST_STRIDE]
        stem = finer[-1] if finer else None
        # Layers behind the last map would be parameters without a gradient.
        taken = self.network.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
        self._indices = [int(index) for index in taken]
        self.network = _with_norm(self.network, config)
        self._freeze([info["module"] for _, info in stages.values()], stem)

    def _stages(self) -> dict[int, tuple[int, Mapping[str, Any]]]:
        """Stride of each stage, rising -> its last map's place among timm's, and timm's facts."""
        found = {
            info["reduction"]: (index, info) for index, info in enumerate(self.network.feature_info)
        }
        return {s: found[s] for s in sorted(found) if s >= FIRST_STRIDE}

    def _freeze(self, ends: list[str], stem: str | None) -> None:
        """Freeze the stem and so many stages; parameters stand in the order of the network.

        Args:
            ends: module that each stage's map comes from: the stage, or its last step.
            stem: likewise of the stem, where timm names one.
        """
        stages = self.config.frozen_stages - 1
        if stages < 0:
            return
        places = {name: k for k, (name, _) in enumerate(self.network.named_modules())}
        owners = {
            name: places[name.rpartition(".")[0]] for name, _ in self.network.named_parameters()
        }

        def last(module: str) -> int:
            return max(
                (k for n, k in places.items() if f"{n}.".startswith(f"{module}.")), default=-1
            )

        end = places.get(ends[0], 0) - 1
        if not any(name.startswith(f"{ends[0]}.") for name in owners):  # a step without parameters
            end = -1 if stem is None else last(stem)
        ends_of_stages = [end, *map(last, ends[:stages])]
        if min(ends_of_stages) < 0:
            raise UserError(
                f"backbone.frozen_stages is {self.config.frozen_stages}, but timm does not say "
                f"which parts of {self.config.name} are its stem and stages: set it to 0, or "
                "backbone.trainable to false to freeze all"
            )
        for name, owner in owners.items():
            if owner <= max(ends_of_stages):
                self.network.get_parameter(name).requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, channels, ceil(height / stride), ceil(width / stride)]."""
        return self.pyramid(pixels, 1)[0]

    def pyramid(self, pixels: Tensor, count: int) -> list[Tensor]:
        """Feature maps [B, channels, h, w] of the last ``count`` stages, finest first.

        Raises:
            UserError: the network asserts another size of images.
        """
        height, width = pixels.shape[-2:]
        x = pixels.contiguous(memory_format=torch.channels_last)
        if not isinstance(self.network, ROUNDING_UP):
            x = functional.pad(x, (0, -width % self.stride, 0, -height % self.stride))
        try:
            maps = self.network.forward_intermediates(
                x, indices=self._indices, intermediates_only=True, output_fmt="NCHW"
            )
        except AssertionError as error:  # timm's networks with windows
            raise UserError(
                f"backbone {self.config.name} does not take images of {x.shape[-1]} x "
                f"{x.shape[-2]} pixels, padding included ({error}): set "
                "data.preprocessing.exact_size to what it takes, or choose a network for images of "
                "any size, for example timm/convnext_atto or torchvision's swin_t"
            ) from error
        kept = zip(maps[-count:], self.stage_strides[-count:], strict=True)
        return [m[..., : -(-height // s), : -(-width // s)] for m, s in kept]


def known_to_timm(name: str) -> str:
    """Timm's own name of a network, with its tag.

    Args:
        name: with the prefix ``timm/``.

    Raises:
        UserError: timm has no such network.
    """
    plain = name.removeprefix(TIMM)
    known = timm.list_models()
    if plain.partition(".")[0] not in known:
        close = difflib.get_close_matches(plain, known, n=3)
        nearest = f"; did you mean {', '.join(TIMM + c for c in close)}?" if close else ""
        raise UserError(f"timm {timm.__version__} has no '{plain}' (backbone {name}){nearest}")
    return plain


def build_timm(name: str, *, pretrained: bool = False) -> Any:
    """Timm's network without a classifier.

    Args:
        name: with the prefix ``timm/``.
        pretrained: with timm's default weights, from its cache or downloaded.

    Raises:
        UserError: timm has no such network, or cannot give maps of its stages.
    """
    plain = known_to_timm(name)
    try:
        network = timm.create_model(plain, pretrained=pretrained, num_classes=0, global_pool="")
    except AssertionError:  # how many of timm's say that they cannot do without pooling
        network = None
    strides = {info["reduction"] for info in getattr(network, "feature_info", [])}
    if not hasattr(network, "forward_intermediates") or len(strides) < 2:
        raise UserError(
            f"backbone {name}: timm gives no maps of several resolutions for it; choose a network "
            "with stages, for example timm/convnext_atto or timm/hgnetv2_b0, or a vision "
            "transformer for images of any size, for example timm/vit_small_patch16_dinov3"
        )
    return network


def _with_norm(network: nn.Module, config: BackboneConfig) -> nn.Module:
    """Frozen statistics, GroupNorm or ours in the place of every batch norm; names stay."""
    norms = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    if config.norm == "frozen" and isinstance(network, HighPerfGpuNet):
        replace_batch_norm(network, config.norm)  # each follows a convolution, which takes it up
        return network
    if config.norm == "frozen":
        frozen: nn.Module = freeze_batch_norm_2d(network)  # type: ignore[no-untyped-call]
        return frozen
    if not norms:
        raise UserError(
            f"backbone.norm '{config.norm}' has no effect on {config.name}: it has no batch norm "
            "to replace"
        )
    replace = _in_groups if config.norm == "group" else _in_batches
    for name, module in norms:
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, replace(module))
    return network


class _GroupNormAct(GroupNorm):
    """GroupNorm and the activation that timm's batch norm had within.

    Args:
        norm: gives groups and channels.
        act: the activation.
    """

    def __init__(self, norm: nn.GroupNorm, act: nn.Module) -> None:
        super().__init__(norm.num_groups, norm.num_channels)
        self.act = act

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, h, w] of the same."""
        result: Tensor = self.act(super().forward(maps))
        return result


class _BatchNormAct(BatchNorm2d):
    """Ours and the activation that timm's batch norm had within.

    Args:
        norm: gives channels, epsilon and momentum.
        act: the activation.
    """

    def __init__(self, norm: BatchNorm2d, act: nn.Module) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.act = act

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, h, w] of the same."""
        result: Tensor = self.act(super().forward(maps))
        return result


def _in_groups(norm: nn.BatchNorm2d) -> nn.Module:
    replaced = group_norm(norm.num_features)
    if isinstance(norm, BatchNormAct2d | FrozenBatchNormAct2d):
        return _GroupNormAct(replaced, norm.act)
    return replaced


def _in_batches(norm: nn.BatchNorm2d) -> nn.Module:
    replaced = BatchNorm2d.like(norm)
    if isinstance(norm, BatchNormAct2d | FrozenBatchNormAct2d):
        return _BatchNormAct(replaced, norm.act)
    return replaced
