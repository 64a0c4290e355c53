"""What crosses the borders between data, detectors and distillation.

Shapes: B images · L decoder layers · N queries of a group · H attention heads ·
S = h*w memory tokens · D model width · C classes · T objects of the fullest image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from d3etr.attention_maps import AttentionMaps, CrossMaps
from d3etr.edge_distributions import BoxDistributions

MAIN = "detection"
"""The student's own queries, by the name that their losses have."""


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; the host does not wait for the copy: memory is pinned for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector that is taken to its device once, however often it is asked for.

    Args:
        values: its numbers.
        dtype: their type.
        device: where it is.
    """
    kept = not torch.compiler.is_exporting()  # tensors of an export hold nothing
    return (_constant if kept else _constant.__wrapped__)(values, dtype, device)


@cache
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return on_device(torch.tensor(values, dtype=dtype), device)


Levels = tuple[tuple[int, int], ...]
"""(height, width) of each feature level, finest first; S is the sum of their areas."""


@dataclass(frozen=True)
class StoredOutputs:
    """What the teacher said about a batch when its outputs were stored (``teacher.views``).

    Attributes:
        values: [B, ...] each, by name, of any floating type; ``methods/stored.py`` has the names.
        levels: the teacher's grids for a batch of this size, where attention was stored.
    """

    values: Mapping[str, Tensor]
    levels: Levels = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> StoredOutputs:
        """All values changed alike."""
        return replace(self, values={name: change(value) for name, value in self.values.items()})


@dataclass(frozen=True)
class ImageBatch:
    """Normalised images of one batch, padded at the right and bottom.

    Attributes:
        pixels: [B, 3, height, width], zero under padding.
        padding: [B, height, width] bool, True under padding; None when no image is
            padded (a fact the collator knows, so nobody has to ask the device).
        for_teacher: the same pictures as the teacher sees them, of another size with a padding of
            their own; None: it sees these.
        stored: what the teacher said about them, where it does not run in training.
    """

    pixels: Tensor
    padding: Tensor | None = None
    for_teacher: ImageBatch | None = None
    stored: StoredOutputs | None = None

    def to(self, device: torch.device) -> ImageBatch:
        """The same batch on ``device``."""
        padding = None if self.padding is None else on_device(self.padding, device)
        theirs = self.for_teacher and self.for_teacher.to(device)
        stored = self.stored and self.stored.map(lambda value: on_device(value, device))
        return ImageBatch(on_device(self.pixels, device), padding, theirs, stored)

    def pin_memory(self) -> ImageBatch:
        """The same batch in memory that devices copy from faster; PyTorch's loader asks for it."""
        padding = None if self.padding is None else self.padding.pin_memory()
        theirs = self.for_teacher and self.for_teacher.pin_memory()
        stored = self.stored and self.stored.map(Tensor.pin_memory)
        return ImageBatch(self.pixels.pin_memory(), padding, theirs, stored)


@dataclass(frozen=True)
class Targets:
    """Ground truth of one batch, padded to the fullest image so that nothing loops over images.

    Boxes are relative to the image itself, not to the padded batch.

    Attributes:
        labels: [B, T] int64 in [0, C), 0 in unused slots.
        boxes_cxcywh: [B, T, 4] in [0, 1], 0 in unused slots.
        counts: objects per image; slots [counts[b], T) of image b are unused.
        image_ids: the annotation file's ids.
        original_sizes: (height, width) in pixels before any transform.
        num_objects: [B] int64, the counts on the labels' device; avoids a device synchronisation.
        labelled: the first so many images have ground truth, all others count as unknown, not as
            empty; None: all have. They come first so that taking them is a view, and it is a number
            of the host's so that nobody has to ask the device.
        scores: [B, T] in [0, 1] how sure it is of each, of boxes that a detector found, 0 in unused
            slots; None: they are ground truth.
        of_teacher: boxes that the teacher found in the same images, where it is boxes in files.
    """

    labels: Tensor
    boxes_cxcywh: Tensor
    counts: tuple[int, ...]
    image_ids: tuple[int, ...]
    original_sizes: tuple[tuple[int, int], ...]
    num_objects: Tensor
    labelled: int | None = None

    def of_labelled(self) -> Targets:
        """Those of the images that have ground truth."""
        known = self.labelled
        if known is None:
            return self
        return Targets(
            self.labels[:known],
            self.boxes_cxcywh[:known],
            self.counts[:known],
            self.image_ids[:known],
            self.original_sizes[:known],
            self.num_objects[:known],
        )

    def of_images(self, chosen: list[int]) -> Targets:
        """Those of some images, of a batch whose images all have ground truth."""
        return Targets(
            self.labels[chosen],
            self.boxes_cxcywh[chosen],
            tuple(self.counts[i] for i in chosen),
            tuple(self.image_ids[i] for i in chosen),
            tuple(self.original_sizes[i] for i in chosen),
            self.num_objects[chosen],
        )

    scores: Tensor | None = None
    of_teacher: Targets | None = None

    def to(self, device: torch.device) -> Targets:
        """The same targets on ``device``."""
        return self.map(lambda values: on_device(values, device))

    def pin_memory(self) -> Targets:
        """The same targets in memory that devices copy from faster."""
        return self.map(Tensor.pin_memory)

    def map(self, change: Callable[[Tensor], Tensor]) -> Targets:
        """All tensors changed alike."""
        return replace(
            self,
            labels=change(self.labels),
            boxes_cxcywh=change(self.boxes_cxcywh),
            num_objects=change(self.num_objects),
            scores=None if self.scores is None else change(self.scores),
            of_teacher=self.of_teacher and self.of_teacher.map(change),
        )


class Grids(NamedTuple):
    """The feature levels that tokens are on.

    Attributes:
        levels: (height, width) in cells of each, finest first.
        strides: pixels per cell of each.
    """

    levels: Levels
    strides: tuple[int, ...]


@dataclass(frozen=True)
class ObjectQueries:
    """One query group: what a decoder starts from.

    A leading B dimension means that each image has its own queries.

    Attributes:
        embedding: [N, D] or [B, N, D], the positional part that attention adds to states.
        reference_logits: reference points [.., N, 2] or anchor boxes [.., N, 4] before the
            sigmoid (a saturated point has no finite inverse); None where a detector has none.
        content: [.., N, D] what the decoder's state starts from; None starts from zeros, as
            all but Deformable DETR do, or from what the decoder's own queries start from.
        place: [B, N] int64 token that a two-stage detector made each query of, over the tokens of
            all levels; None where a query has none.
        grids: the levels that ``place`` runs over, wherever that is known.
        blocks: 0: in self-attention the group's queries see each other and nobody else. K: they
            are K equal blocks side by side, each of which sees itself and the first group that is
            decoded with it (denoising queries).
        see_first: False: blocks see themselves alone (copies of the detector's own queries); such a
            group has no attention maps.
        start: [B, N, 4] cxcywh, boxes whose edges a detector that refines distributions moves, in
            place of those that its first layer proposes; None leaves these.
        reference_boxes: [.., N, 4] cxcywh that ``reference_logits`` are of, of detectors whose
            boxes may reach beyond the picture, where logits are cut off at its edge.
    """

    embedding: Tensor
    reference_logits: Tensor | None = None
    content: Tensor | None = None
    place: Tensor | None = None
    grids: Grids | None = None
    blocks: int = 0
    see_first: bool = True
    start: Tensor | None = None
    reference_boxes: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of queries N."""
        return self.embedding.shape[-2]

    def map(self, change: Callable[[Tensor], Tensor]) -> ObjectQueries:
        """All features that there are, changed alike; the rest is dropped."""
        parts = (self.embedding, self.reference_logits, self.content, self.reference_boxes)
        embedding, reference, content, boxes = (None if x is None else change(x) for x in parts)
        assert embedding is not None
        return ObjectQueries(embedding, reference, content, reference_boxes=boxes)

    def detach(self) -> ObjectQueries:
        """The same queries outside the autograd graph."""
        own = self.map(Tensor.detach)
        own = replace(own, place=self.place, grids=self.grids, start=self.start)
        return replace(own, blocks=self.blocks, see_first=self.see_first)


class Supervision(Enum):
    """How a query group learns from ground truth."""

    HUNGARIAN = auto()
    """By an assignment of its own outputs."""
    TEACHER = auto()
    """By the assignment of the teacher's outputs for the same queries."""
    GIVEN = auto()
    """Each query is made from an object, whose index is known."""
    NONE = auto()


@dataclass(frozen=True)
class QueryGroup:
    """Queries that a student decodes, and how they learn from ground truth.

    Attributes:
        queries: N of them.
        supervision: where their assignment to objects comes from.
        teacher: outputs of the teacher for these queries, with ``Supervision.TEACHER``.
        objects: [B, N] int64 object of each query, -1 for none, with ``Supervision.GIVEN``.
        copies: queries that learn each object, by which the losses are divided too.
        pairs: queries of each image that have an object, with ``Supervision.GIVEN``; None: the
            host waits for the device to count them.
    """

    queries: ObjectQueries
    supervision: Supervision = Supervision.HUNGARIAN
    teacher: DecoderOutputs | None = None
    objects: Tensor | None = None
    copies: int = 1
    pairs: tuple[int, ...] | None = None


class TokenScores(NamedTuple):
    """What an encoder says about each token before it selects some.

    Attributes:
        logits: [B, S, C] of classes.
        silent: [B or 1, S] bool, tokens that propose nothing, such as those under padding.
    """

    logits: Tensor
    silent: Tensor


@dataclass(frozen=True)
class Memory:
    """Encoder output.

    Attributes:
        tokens: [B, S, D], level by level, row-major over each level's grid.
        position: [B, S, D] position encoding of each token, or [1, S, D] where no image is
            padded and all share it.
        padding: [B, S] bool, True under padding, or None.
        levels: the grids that S runs over; one for all but multi-scale detectors.
        proposals: what a two-stage detector's encoder says about each token, or about those it
            selected, one layer [1, B, S, ..]; None for other detectors. K layers of a detector
            that selects K times in training, for as many groups.
        proposal_logits: [B, S, 4] the proposals' boxes before the sigmoid, infinite where a token
            proposes nothing; None for other detectors.
        queries: [B, N, ..] that the encoder selected, of detectors that propose by those alone; of
            all K groups, as so many blocks.
        scores: of all tokens, of such detectors.
    """

    tokens: Tensor
    position: Tensor
    padding: Tensor | None
    levels: Levels
    proposals: DecoderOutputs | None = None
    proposal_logits: Tensor | None = None
    queries: ObjectQueries | None = None
    scores: TokenScores | None = None


@dataclass(frozen=True)
class DecoderOutputs:
    """What a decoder says about one query group, all layers stacked.

    Attributes:
        logits: [L, B, N, C], raw.
        boxes_cxcywh: [L, B, N, 4] in [0, 1].
        self_maps: attention of the queries among themselves, before any dropout; None unless
            asked for. Of a group with K blocks, [L, B, H, N, N / K] among those of the same block.
        cross_maps: their attention to the memory, likewise.
        levels: the grids of the memory that S runs over.
        padding: [B, S] bool, True under padding, or None.
        states: [B, N, D] decoder states that the last layer's logits are read from.
        softmax_classes: an object has one class: the probabilities of all classes sum to 1 at most.
        no_object: [L, B, N] log-probability that there is none, where classes are exclusive and
            the outputs are a detector's own; else None.
        distributions: the boxes as distributions, of detectors that refine those.
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    self_maps: AttentionMaps | None = None
    cross_maps: CrossMaps | None = None
    levels: Levels = ()
    padding: Tensor | None = None
    states: Tensor | None = None
    softmax_classes: bool = False
    no_object: Tensor | None = None
    distributions: BoxDistributions | None = None

    @property
    def self_attention(self) -> Tensor:
        """[L, B, H, N, N]: rows sum to 1."""
        if self.self_maps is None:
            raise ValueError("decode(..., attention=True) is needed for self-attention maps")
        return self.self_maps.scores().softmax(-1)

    @property
    def cross_attention(self) -> Tensor:
        """[L, B, H, N, S]: rows sum to 1."""
        if self.cross_maps is None:
            raise ValueError("decode(..., attention=True) is needed for cross-attention maps")
        return self.cross_maps.scores().softmax(-1)

    @property
    def layers(self) -> int:
        """Number of decoder layers L."""
        return self.logits.shape[0]

    @property
    def queries(self) -> int:
        """Number of queries N."""
        return self.logits.shape[2]

    def of_first(self, images: int | None) -> DecoderOutputs:
        """Outputs for the first so many images, without attention maps; None: as they are."""
        if images is None:
            return self

        def first(values: Tensor | None, dim: int) -> Tensor | None:
            return None if values is None else values.narrow(dim, 0, images)

        return replace(
            self,
            logits=self.logits[:, :images],
            boxes_cxcywh=self.boxes_cxcywh[:, :images],
            self_maps=None,
            cross_maps=None,
            padding=first(self.padding, 0),
            states=first(self.states, 0),
            no_object=first(self.no_object, 1),
            distributions=self.distributions and self.distributions.of_first(images),
        )

    def confidence(self) -> Tensor:
        """[L, B, N]: the highest class probability of each query, max_c sigma(z_c)."""
        return self.logits.amax(-1).sigmoid()
