"""Queries of the teacher, random ones, general points and those of objects.

All as a student's decoder takes them.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from d3etr.config.detector import DetectorConfig
from d3etr.methods.selection import share_of
from d3etr.structures import ObjectQueries, Targets, on_device


class TeacherQueries(nn.Module):
    """Fixed Matching: the teacher's object queries and references in the student's decoder.

    Contents are the teacher's, the student's own at the teacher's place, or vectors that the
    student has learned (``auxiliary_group.content``). Where the widths differ, a learned linear map
    bridges them; where the student wants more numbers of a reference than the teacher has (an
    anchor box of a point, say), another one reads the missing logits from the teacher's embedding.
    Both are dropped after training. That the queries are the teacher's is D3ETR's; that their
    references come along and the linear maps are our choices.

    Args:
        teacher: the teacher's architecture.
        student: the student's.
        content: ``auxiliary_group.content``; None: the student kind's default.
    """

    def __init__(
        self,
        teacher: DetectorConfig,
        student: DetectorConfig,
        content: Literal["own", "adapted", "learned"] | None = None,
    ) -> None:
        super().__init__()
        self.size = student.reference_size
        same = teacher.width == student.width
        adapts = student.takes_embedding and not same
        self.adapter: nn.Module = (
            nn.Linear(teacher.width, student.width) if adapts else nn.Identity()
        )
        missing = self.size - teacher.reference_size
        self.reference: nn.Linear | None = None
        if missing > 0 and not student.derives_references:
            self.reference = nn.Linear(teacher.width, missing)
        self.content: nn.Module | None = None
        adapts_content = (content or student.auxiliary_content) == "adapted"
        if adapts_content and student.takes_content and teacher.takes_content:
            self.content = nn.Identity() if same else nn.Linear(teacher.width, student.width)

    def forward(self, queries: ObjectQueries) -> ObjectQueries:
        """The group as the student's decoder takes it."""
        content = queries.content
        return ObjectQueries(
            self.adapter(queries.embedding),
            self._references(queries),
            None if self.content is None or content is None else self.content(content),
            queries.place,
            queries.grids,
            reference_boxes=queries.reference_boxes if self.size == 4 else None,
        )

    def _references(self, queries: ObjectQueries) -> Tensor | None:
        given = queries.reference_logits
        if self.reference is not None:
            missing = self.reference(queries.embedding)
            return missing if given is None else torch.cat([given, missing], -1)
        return None if given is None or self.size == 0 else given[..., : self.size]


class RandomQueries(nn.Module):
    """A control: frozen random queries, drawn once from a seed.

    Args:
        teacher: the teacher's architecture: as many queries as it has.
        student: the student's, which says what references look like.
        ratio: share of them that is drawn.
        seed: of the generator.
    """

    embedding: Tensor
    reference_logits: Tensor | None

    def __init__(
        self, teacher: DetectorConfig, student: DetectorConfig, ratio: float, seed: int
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        count = share_of(teacher.queries, ratio)
        self.register_buffer("embedding", torch.randn(count, student.width, generator=generator))
        reference = None
        if student.reference_size:
            places = torch.rand(count, student.reference_size, generator=generator)
            reference = places.logit(eps=1e-3)
        self.register_buffer("reference_logits", reference)

    def forward(self, queries: ObjectQueries | None) -> ObjectQueries:
        """The random group; the teacher's ``queries`` are not used."""
        return ObjectQueries(self.embedding, self.reference_logits)


class GeneralPoints:
    """Fresh random queries in each step, like the teacher's own (KD-DETR's general points).

    Embeddings and contents are normal with the mean and deviation of the teacher's, places are
    uniform over the image, as the paper says, and sizes of anchors are the teacher's, shuffled.

    Args:
        count: how many.
        seed: with the step, all that a draw depends on: workers and micro-batches share it.
        content: whether they have one of their own; else each decoder starts from what its own
            queries start from.
    """

    def __init__(self, count: int, seed: int, content: bool = True) -> None:
        self._count, self._seed, self._content = count, seed, content

    @classmethod
    def of(cls, teacher: DetectorConfig, count: int, seed: int) -> GeneralPoints | None:
        """Those that a teacher decodes; None of no points."""
        content = teacher.auxiliary_content == "adapted"
        return cls(count, seed, content=content) if count else None

    def draw(self, like: ObjectQueries, step: int) -> ObjectQueries:
        """The points of one step: [count, ..] shared by all images, as the teacher's queries are.

        Of a two-stage teacher, whose queries are each image's own, [B, count, ..]: the same
        random numbers on each image's own mean, deviation and sizes. So an image's points depend
        on nothing else in its batch.

        Args:
            like: the teacher's queries, [M, ..] or [B, M, ..].
            step: optimiser step.
        """
        # Seeds of runs have 63 bits already, and a generator takes no more.
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + step) % 2**63)
        reference = like.reference_logits
        return ObjectQueries(
            self._normal(like.embedding, generator),
            None if reference is None else self._places(reference, generator),
            self._normal(like.content, generator)
            if self._content and like.content is not None
            else None,
        )

    def _normal(self, like: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(self._count, like.shape[-1], generator=generator)
        return _as_spread(on_device(drawn, like.device).to(like), like)

    def _places(self, like: Tensor, generator: torch.Generator) -> Tensor:
        places = torch.rand(self._count, 2, generator=generator).logit(eps=1e-3)
        chosen = torch.randint(like.shape[-2], (self._count,), generator=generator)
        sizes = like[..., on_device(chosen, like.device), 2:]
        places = on_device(places, like.device).to(like).expand(*like.shape[:-2], -1, -1)
        return torch.cat([places, sizes], -1)


def _as_spread(values: Tensor, like: Tensor) -> Tensor:
    """Values of mean 0 and deviation 1 with the mean and deviation of ``like`` [.., M, D]."""
    # A lone query has no deviation, which would be NaN.
    deviation = like.std(-2, correction=min(1, like.shape[-2] - 1), keepdim=True)
    return values * deviation + like.mean(-2, keepdim=True)


class TargetQueries(nn.Module):
    """Queries of the teacher's kind, made of objects (CLoCKDistill's target-aware queries).

    The paper's: a query is a frozen embedding of the object's class plus a network of its box. Our
    choices: references are the object's box or centre; both parts are random cosines (Rahimi and
    Recht 2007) with the mean and deviation of the teacher's own queries, so the network is frozen
    too and any number of classes has embeddings; where queries have a content, that is the class's
    and the embedding is the box's. Groups have one size, so that an image's losses depend on
    nothing else in its batch; what is no object is a query at the image's centre.

    Args:
        width: D', the teacher's.
        count: K, queries of an image; objects beyond are left out.
        seed: of the cosines.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int, count: int, seed: int) -> None:
        super().__init__()
        self.count = count
        generator = torch.Generator().manual_seed(seed)
        frequencies = torch.randn(5, width, generator=generator)
        # Whole numbers differ by a random angle then, and boxes within a fifth of the image less.
        frequencies[4] = torch.rand(width, generator=generator)
        self.register_buffer("frequencies", 2 * math.pi * frequencies)
        phases = torch.rand(2, width, generator=generator)
        self.register_buffer("phases", 2 * math.pi * phases)

    def used(self, targets: Targets) -> Tensor:
        """[B, K] bool: which queries are made of objects."""
        slots = torch.arange(self.count, device=targets.num_objects.device)
        return slots < targets.num_objects[:, None]

    def forward(self, targets: Targets, like: ObjectQueries) -> ObjectQueries:
        """The queries [B, K, ..], of the teacher's width.

        Args:
            targets: ground truth.
            like: the teacher's own queries [M, ..] or [B, M, ..], with references.
        """
        reference = like.reference_logits
        assert reference is not None, "such teachers are refused"
        used, more = self.used(targets), self.count - targets.labels.shape[1]
        boxes = pad(targets.boxes_cxcywh, (0, 0, 0, more)).where(used[..., None], 0.5)
        numbers = (pad(targets.labels, (0, more)) + 1) * used
        # No product of matrices: autocast would round the angles.
        angles = (boxes[..., None] * self.frequencies[:4]).sum(-2) + self.phases[0]
        place = math.sqrt(2) * angles.cos()
        angles = numbers[..., None] * self.frequencies[4] + self.phases[1]
        kind = math.sqrt(2) * angles.cos()
        size = reference.shape[-1]
        logits = boxes[..., :size].logit(eps=1e-3)
        if like.content is not None:
            content = _as_spread(kind, like.content)
            return ObjectQueries(_as_spread(place, like.embedding), logits, content)
        both = (place + kind) / math.sqrt(2)
        return ObjectQueries(_as_spread(both, like.embedding), logits)
