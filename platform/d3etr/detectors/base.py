"""What every detector of the family is, and what those with one feature level share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.denoising import (
    RT_DETRS,
    DenoisingConfig,
    DenoisingDetails,
    denoising_group,
)
from d3etr.detectors.groups import Decoded, GroupSize, side_by_side, sizes_of, split_groups
from d3etr.detectors.position import TEMPERATURE, SineEncoding
from d3etr.detectors.transformer import Encoder
from d3etr.structures import DecoderOutputs, ImageBatch, Memory, ObjectQueries, QueryGroup, Targets


class DetectionTransformer(nn.Module, ABC):
    """A detector of the DETR family as a module.

    Args:
        config: architecture.
        classes: C.

    Attributes:
        config_class: section of the configuration that describes detectors of this class.
        denoising_details: of the official code whose denoising queries it has.
        config: the architecture.
        classes: C.
        backbone: the convolutional network.
        stride: pixels per cell of the finest feature level.
        inherited: names of the tensors that began as another detector's.
        label_embedding: of the classes of denoising queries, C + 1 rows, whose last one is that of
            no object; None: the detector has none.
    """

    config_class: ClassVar[type[DetectorConfig]]
    denoising_details: ClassVar[DenoisingDetails] = RT_DETRS
    stride: int
    inherited: frozenset[str] = frozenset()

    def __init__(self, config: DetectorConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.classes = classes
        self.backbone = build_backbone(config.backbone)
        self.label_embedding: nn.Embedding | None = None

    @property
    def level_strides(self) -> tuple[int, ...]:
        """Pixels per cell of each feature level, finest first."""
        return tuple(self.stride * 2**level for level in range(self.config.feature_levels))

    @abstractmethod
    def encode(self, images: ImageBatch) -> Memory:
        """Run backbone and encoder on B padded images."""

    @abstractmethod
    def object_queries(self, memory: Memory | None = None) -> ObjectQueries:
        """The main group; a two-stage detector makes it from ``memory``."""

    def training_groups(self, memory: Memory, targets: Targets, step: int) -> dict[str, QueryGroup]:
        """Query groups that the detector brings for its own training; none by default.

        Denoising queries (noised ground truth) and copies of the main group are such groups; the
        main one itself is among them where it shares its objects with copies. They are the same by
        name in every batch, as losses of micro-batches and workers are added up by name: where a
        batch gives nothing to make one of, it has no queries. What they alone train needs a
        gradient also in such a step (``denoising.touching``).

        Args:
            memory: encoder output.
            targets: ground truth.
            step: optimiser step, for whatever is drawn.
        """
        return {}

    def denoising_queries(self, targets: Targets, config: DenoisingConfig, step: int) -> QueryGroup:
        """Noised ground truth as queries of this detector, in training or not.

        Two detectors of the same classes get the same noise, query by query.

        Args:
            targets: ground truth.
            config: how many, and of what noise; another detector's where both are compared.
            step: optimiser step; with the images' ids, all that the noise depends on.

        Returns:
            A group of none where no image with labels has an object.
        """
        if self.label_embedding is None:
            raise ValueError(f"this {self.config.name} has no denoising queries")
        embedding, details = self.label_embedding.weight, self.denoising_details
        return denoising_group(targets, embedding, config, step=step, details=details)

    def decode(
        self,
        memory: Memory,
        groups: Sequence[ObjectQueries],
        *,
        attention: bool = False,
        maps_of_blocks: bool = False,
    ) -> list[DecoderOutputs]:
        """Decode query groups side by side in one pass.

        Groups never see each other, but for those with ``blocks``, which may see the first one. One
        without queries is not decoded: its outputs are empty, and within the graph.

        Args:
            memory: encoder output.
            groups: a group's references are used as they are, whoever made them; a group without
                any gets this detector's for its embedding, where it makes them.
            attention: also return the attention maps of every layer.
            maps_of_blocks: those of groups with blocks too.

        Returns:
            One entry per group.
        """
        sizes = sizes_of(groups, maps_of_blocks)
        there = [group for group in groups if group.count]
        decoded = self.decode_together(
            memory, there, [size for size in sizes if size.queries], attention
        )
        return split_groups(memory, sizes, decoded)

    @abstractmethod
    def decode_together(
        self,
        memory: Memory,
        groups: Sequence[ObjectQueries],
        sizes: list[GroupSize],
        attention: bool,
    ) -> Decoded:
        """The pass of ``decode``, for all groups side by side; ``sizes`` are theirs."""

    def zero_states(self, like: Tensor, memory: Memory) -> Tensor:
        """Where decoder states start: zeros [B or 1, N, D] for queries ``like`` [B or 1, N, ..].

        Dropout tells images apart; without it, those of queries that all images share stay
        shared until they meet their image's memory.
        """
        states = like.new_zeros(*like.shape[:2], self.config.width)
        per_image = self.training and self.config.dropout > 0
        return states.expand(memory.tokens.shape[0], -1, -1) if per_image else states

    def references(self, groups: Sequence[ObjectQueries]) -> Tensor:
        """[B or 1, N, 2 or 4] reference logits of all groups side by side, float32.

        Raises:
            ValueError: references of another size, or none where this detector makes none.
        """
        size, parts = self.config.reference_size, []
        for group in groups:
            given = group.reference_logits
            if given is None and self.config.derives_references:
                given = self.derive_references(group.embedding)
            if given is None or given.shape[-1] != size:
                raise ValueError(f"this {self.config.name} takes references [.., N, {size}]")
            parts.append(given)
        return side_by_side(parts).float()

    def derive_references(self, embedding: Tensor) -> Tensor:
        """[.., N, D] embeddings to the reference logits [.., N, 2] that belong to them."""
        raise NotImplementedError


class SingleScaleDetector(DetectionTransformer):
    """Encoder over the backbone's last feature map: DETR, Conditional DETR, DAB-DETR.

    Args:
        config: architecture.
        classes: C.
        scaled_positions: as of ``Encoder``.
        temperature: of the position encoding of grid cells.
    """

    def __init__(
        self,
        config: DetectorConfig,
        classes: int,
        scaled_positions: bool = False,
        temperature: float = TEMPERATURE,
    ) -> None:
        super().__init__(config, classes)
        self.stride = self.backbone.stride
        self.projection = nn.Linear(self.backbone.channels, config.width)
        self.position = SineEncoding(config.width, temperature)
        self.encoder = Encoder(config, scaled=scaled_positions)

    def encode(self, images: ImageBatch) -> Memory:
        """Run backbone and encoder.

        Args:
            images: B padded images.

        Returns:
            Memory of S = ceil(height / stride) * ceil(width / stride) tokens.
        """
        features = self.backbone(images.pixels)
        grid = (features.shape[-2], features.shape[-1])
        # A 1x1 convolution; on channels-last features the reordering is free.
        tokens = self.projection(features.permute(0, 2, 3, 1).flatten(1, 2))
        padding = shrink_padding(images.padding, grid)
        position = self.position.grid(grid, padding)
        if padding is not None:
            padding = padding.flatten(1)
        return Memory(self.encoder(tokens, position, padding=padding), position, padding, (grid,))


def sampled_memory(maps: Sequence[Tensor], padding: Tensor | None) -> Memory:
    """Feature maps as the memory of a decoder that samples them by place and reads no positions.

    Args:
        maps: [B, D, h, w] each, finest first.
        padding: [B, height, width] bool of the images, or None.
    """
    levels = tuple((part.shape[-2], part.shape[-1]) for part in maps)
    tokens = torch.cat([part.flatten(2).transpose(1, 2) for part in maps], 1)
    position = tokens.new_zeros(1, 1, 1).expand(1, *tokens.shape[1:])
    flat = flat_padding([shrink_padding(padding, grid) for grid in levels])
    return Memory(tokens, position, flat, levels)


def flat_padding(paddings: Sequence[Tensor | None]) -> Tensor | None:
    """[B, h, w] bool of each level to [B, S] over all of them; None where nothing is padded."""
    found = [padding.flatten(1) for padding in paddings if padding is not None]
    return torch.cat(found, 1) if found else None


def shrink_padding(padding: Tensor | None, grid: tuple[int, int]) -> Tensor | None:
    """[B, height, width] bool at the images' resolution to [B, *grid], by nearest neighbours."""
    if padding is None:
        return None
    return functional.interpolate(padding[None].float(), size=grid)[0].bool()
