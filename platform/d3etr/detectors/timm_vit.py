"""Timm's plain vision transformers as backbones, DINOv2's and DINOv3's among them: one stride.

Shapes: B images · h, w patches of an image · D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from timm.layers.patch_embed import PatchEmbed
from timm.models import is_model_in_modules
from torch import Tensor, nn

from d3etr.config.backbone import BackboneConfig
from d3etr.detectors.block_depth import layers_of
from d3etr.detectors.timm_backbone import known_to_timm
from d3etr.errors import UserError

_MODULES = frozenset({"vision_transformer", "deit", "eva"})
"""Timm's modules whose networks resize their position embeddings to the image."""
_QUARTERS = 4


class TimmViT(nn.Module):
    """A vision transformer of timm without its classifier; weight names are timm's.

    Maps are ceil(size / stride) large: images are padded with zeros to a multiple of the patch, as
    images in a batch are. They come behind the network's last norm, where it norms tokens and not
    their mean, and without class and register tokens.

    Args:
        config: uses name, outputs, drop_path and frozen_stages.

    Attributes:
        config: what it was built from.
        channels: D.
        stride: pixels per patch.
        stage_channels: the one stage's.
        stage_strides: likewise.
        map_channels: of each map of ``maps``.

    Raises:
        UserError: timm has no such network, or one for images of one size only, or ``outputs`` or
            ``frozen_stages`` are more than its blocks.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.network = build_timm_vit(config.name, drop_path_rate=config.drop_path)
        blocks = len(self.network.blocks)
        outputs = config.outputs or _quarters(blocks)
        if outputs[-1] > blocks:
            raise UserError(
                f"backbone.outputs {list(outputs)}: {config.name} has {blocks} blocks only"
            )
        if config.frozen_stages > outputs[-1]:
            raise UserError(
                f"backbone.frozen_stages is {config.frozen_stages}: expected {outputs[-1]} at most "
                f"(embeddings and all but one of {outputs[-1]} blocks of {config.name}); "
                "backbone.trainable false freezes them all"
            )
        self._indices = [number - 1 for number in outputs]
        self.network.prune_intermediate_layers(self._indices, prune_head=True)
        self.channels, self.stride = self.network.embed_dim, self.network.patch_embed.patch_size[0]
        self.stage_channels, self.stage_strides = (self.channels,), (self.stride,)
        self.map_channels = (self.channels,) * len(outputs)
        for layer in layers_of(self)[: config.frozen_stages]:
            for parameter in layer:
                parameter.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, D, h, w], the last map."""
        return self._after(pixels, self._indices[-1:])[0]

    def pyramid(self, pixels: Tensor, count: int) -> list[Tensor]:
        """The last map alone: there is one stage, whatever ``count``."""
        return [self.forward(pixels)]

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """[B, D, h, w] behind the blocks that ``outputs`` names."""
        return self._after(pixels, self._indices)

    def _after(self, pixels: Tensor, indices: Sequence[int]) -> list[Tensor]:
        maps: list[Tensor] = self.network.forward_intermediates(
            pixels, indices=[*indices], norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return maps


def _quarters(blocks: int) -> tuple[int, ...]:
    """Numbers of blocks after each quarter of them."""
    return tuple(sorted({-(-blocks * part // _QUARTERS) for part in range(1, _QUARTERS + 1)}))


def build_timm_vit(name: str, *, pretrained: bool = False, drop_path_rate: float = 0.0) -> Any:
    """Timm's network without a classifier, for images of any size.

    Args:
        name: with the prefix ``timm/``.
        pretrained: with timm's default weights, from its cache or downloaded.
        drop_path_rate: of the last block; those of the others rise to it evenly from 0.

    Raises:
        UserError: timm has no such network, or one for images of one size only.
    """
    plain = known_to_timm(name)
    network = None
    if is_model_in_modules(plain.partition(".")[0], _MODULES):
        # The default pooling stays: it decides where a network has its last norm.
        network = timm.create_model(
            plain,
            pretrained=pretrained,
            num_classes=0,
            drop_path_rate=drop_path_rate,
            dynamic_img_size=True,
            dynamic_img_pad=True,
        )
    if network is None or type(network.patch_embed) is not PatchEmbed:
        raise UserError(
            f"backbone {name}: timm's network takes images of one size only, or is no plain vision "
            "transformer; choose one that is, for example timm/vit_small_patch16_dinov3, or a "
            "network with stages, for example timm/hgnetv2_b0"
        )
    return network
