"""Contrastive denoising queries: noised ground truth that a decoder learns to restore.

(DINO, Zhang et al., arXiv 2203.03605, section 3.3; the details are those of RT-DETR's code, arXiv
2304.08069.) A block holds a positive and a negative query of each object: near its box, which the
query learns, and farther away, which learns that nothing is there.

Shapes: B images · G objects of the fullest labelled image · K blocks · N = 2 K G queries, block by
block, positives first · C classes · D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from d3etr.config.base import MAXIMUM, Section
from d3etr.config.detector import DetectorConfig
from d3etr.structures import ObjectQueries, QueryGroup, Supervision, Targets, on_device

DENOISING = "denoising"
"""Name of the group and its losses."""


class DenoisingDetails(NamedTuple):
    """What official codes do differently.

    Attributes:
        epsilon: what a box's logits are computed from is at least this far from 0 and 1.
        unused: centre and sides of the box of slots beyond an image's objects.
    """

    epsilon: float
    unused: float


RT_DETRS, DINOS = DenoisingDetails(1e-5, 0.0), DenoisingDetails(1e-3, 0.5)


class DenoisingConfig(Section):
    """Denoising queries, made of ground truth in training only."""

    queries: Annotated[int, Field(ge=0, le=65_536)] = 100
    """Positive queries for each image, about: blocks of one for each object of the batch's fullest
    image, as many as fit and one at least. As many negative ones join them. 0 leaves them out."""
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Half of it is the share of queries that start from a random class."""
    box_noise: Annotated[float, Field(ge=0, le=MAXIMUM)] = 1.0
    """How far corners are moved, as a share of half the box's sides: up to once it of positive
    queries, once to twice it of negative ones."""


def denoising_of(detector: DetectorConfig) -> DenoisingConfig | None:
    """The denoising queries that a detector trains with, its key ``denoising``; None: none."""
    found = getattr(detector, "denoising", None)
    return found if isinstance(found, DenoisingConfig) and found.queries else None


@dataclass(frozen=True)
class DenoisingNoise:
    """Random numbers of one batch.

    Attributes:
        doubts: [B, N] in [0, 1); a class is replaced where it is below label_noise / 2.
        classes: [B, N] int64 in [0, C), what replaces it.
        moves: [B, N, 4] in [0, 1), how far each corner coordinate is moved.
        signs: [B, N, 4] -1 or 1, where to.
    """

    doubts: Tensor
    classes: Tensor
    moves: Tensor
    signs: Tensor

    def to(self, device: torch.device) -> DenoisingNoise:
        """The same on ``device``; the host does not wait for the copies."""
        return DenoisingNoise(
            *(on_device(getattr(self, field.name), device) for field in fields(self))
        )


def denoising_blocks(targets: Targets, config: DenoisingConfig) -> tuple[int, int]:
    """How many blocks K, and objects G of the fullest image; (0, 0) where there are no queries.

    Both follow from numbers that the host knows.
    """
    fullest = max(targets.of_labelled().counts, default=0)
    if not config.queries or not fullest:
        return 0, 0
    return max(1, config.queries // fullest), fullest


def draw_noise(
    image_ids: tuple[int, ...], queries: int, classes: int, *, step: int, seed: int = 0
) -> DenoisingNoise:
    """Random numbers on the host, each image's from a generator of its own.

    So a run that goes on draws what it would have drawn, on any worker and device.

    Args:
        image_ids: of the batch.
        queries: N.
        classes: C.
        step: optimiser step.
        seed: of what is drawn.
    """
    drawn = []
    for image in image_ids:
        number = ((seed * 1_000_003 + step) * 1_000_003 + image) % 2**63
        generator = torch.Generator().manual_seed(number)
        drawn.append(
            (
                torch.rand(queries, generator=generator),
                torch.randint(classes, (queries,), generator=generator),
                torch.rand(queries, 4, generator=generator),
                torch.randint(2, (queries, 4), generator=generator) * 2.0 - 1.0,
            )
        )
    return DenoisingNoise(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))


def existing_objects(targets: Targets, fullest: int) -> Tensor:
    """[B, G] bool: which of the first G slots hold an object of an image with labels."""
    images, known = len(targets.counts), len(targets.of_labelled().counts)
    slots = torch.arange(fullest, device=targets.labels.device)
    exists = slots < targets.num_objects[:, None]
    if known < images:
        exists = exists & (torch.arange(images, device=slots.device) < known)[:, None]
    return exists


def noised_objects(
    targets: Targets,
    noise: DenoisingNoise,
    classes: int,
    config: DenoisingConfig,
    details: DenoisingDetails = RT_DETRS,
) -> tuple[Tensor, Tensor, Tensor]:
    """What denoising queries start from.

    Slots beyond an image's objects, and all of images without labels, are class C and one box; as
    in the official codes, queries of them take part and learn nothing.

    Args:
        targets: ground truth.
        noise: random numbers on the targets' device.
        classes: C.
        config: of the noise.
        details: of the official code.

    Returns:
        Classes [B, N] int64 in [0, C], logits of boxes [B, N, 4] cxcywh, and [B, N] int64 the
        object that each query shall restore, -1 for none.
    """
    blocks, fullest = denoising_blocks(targets, config)
    exists = existing_objects(targets, fullest)
    slots = torch.arange(fullest, device=exists.device)
    labels = targets.labels[:, :fullest].masked_fill(~exists, classes).repeat(1, 2 * blocks)
    boxes = targets.boxes_cxcywh[:, :fullest].float().masked_fill(~exists[..., None], 0.0)
    boxes, used = boxes.repeat(1, 2 * blocks, 1), exists.repeat(1, 2 * blocks)
    replaced = (noise.doubts < config.label_noise / 2) & used
    negative = torch.arange(2 * blocks * fullest, device=slots.device) // max(1, fullest) % 2
    objects = slots.repeat(2 * blocks).where((negative == 0) & used, -1)
    reach = boxes[..., 2:].repeat(1, 1, 2) / 2 * config.box_noise
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = torch.cat([centre - half, centre + half], -1)
    corners = corners + (noise.moves + negative[:, None]) * noise.signs * reach
    low, high = corners.clamp(0, 1).chunk(2, -1)
    noised = torch.cat([(low + high) / 2, high - low], -1)
    noised = noised.masked_fill(~used[..., None], details.unused)
    return noise.classes.where(replaced, labels), _logits(noised, details.epsilon), objects


def denoising_group(
    targets: Targets,
    class_embedding: Tensor,
    config: DenoisingConfig,
    *,
    step: int,
    seed: int = 0,
    noise: DenoisingNoise | None = None,
    details: DenoisingDetails = RT_DETRS,
) -> QueryGroup:
    """Denoising queries of a batch; a group of none where no labelled image has an object.

    So every micro-batch has the same losses by name, whose zeros add up with those of others.
    Their reference boxes are the noised ones, and so is their content, the embedding of the noised
    class; their positional embedding is zero, as those detectors have it whose decoder makes it
    from references.

    Args:
        targets: ground truth on the device of the embedding.
        class_embedding: [C + 1, D]; its last row, which gets no gradient, is that of unused slots.
        config: of the noise.
        step: optimiser step.
        seed: with the step and the images' ids, all that the noise depends on.
        noise: random numbers [B, N], such as a test's; None draws them.
        details: of the official code.
    """
    blocks, fullest = denoising_blocks(targets, config)
    classes, device = len(class_embedding) - 1, class_embedding.device
    if noise is None:
        count = 2 * blocks * fullest
        noise = draw_noise(targets.image_ids, count, classes, seed=seed, step=step)
    labels, boxes, objects = noised_objects(targets, noise.to(device), classes, config, details)
    content = functional.embedding(labels, class_embedding, padding_idx=classes)
    known = targets.of_labelled().counts
    return QueryGroup(
        ObjectQueries(torch.zeros_like(content), boxes, content, blocks=blocks),
        Supervision.GIVEN,
        objects=objects,
        copies=blocks,
        pairs=tuple(blocks * n for n in known) + (0,) * (len(targets.counts) - len(known)),
    )


def touching(queries: ObjectQueries, class_embedding: Tensor) -> ObjectQueries:
    """The same queries, with a gradient of 0 for the embedding of classes.

    A worker without objects has no denoising queries, and workers wait for the gradient of every
    parameter: a detector in training says this of its main group.

    Args:
        queries: their content, or without one their embedding, reaches the losses.
        class_embedding: [C + 1, D].
    """
    nothing = 0.0 * class_embedding.sum()
    if queries.content is None:
        return replace(queries, embedding=queries.embedding + nothing)
    return replace(queries, content=queries.content + nothing)


def _logits(boxes: Tensor, epsilon: float) -> Tensor:
    """The inverse sigmoid of values clamped to [0, 1], finite at both ends.

    Corners that were moved past each other make a negative side, which becomes the smallest.
    """
    boxes = boxes.clamp(0, 1)
    return (boxes.clamp(min=epsilon) / (1 - boxes).clamp(min=epsilon)).log()
