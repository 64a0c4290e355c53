"""The queries of the auxiliary group, as the student's decoder takes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d3etr.distillation.teaching import group_size
from d3etr.structures import ObjectQueries


class TeacherQueries(nn.Module):
    """Fixed Matching: the teacher's object queries and reference points in the student's decoder.

    Where the widths differ, a learned linear map bridges them; it is dropped after training.
    That the queries are the teacher's is D3ETR's; that their reference points come along and
    the linear map are our choices.
    """

    def __init__(self, teacher_width: int, width: int) -> None:
        super().__init__()
        same = teacher_width == width
        self.adapter: nn.Module = nn.Identity() if same else nn.Linear(teacher_width, width)

    def forward(self, queries: ObjectQueries) -> ObjectQueries:
        """The group with the student's width."""
        return ObjectQueries(self.adapter(queries.embedding), queries.reference_logits)


class RandomQueries(nn.Module):
    """A control: frozen random queries, drawn once from a seed."""

    embedding: Tensor
    reference_logits: Tensor | None

    def __init__(self, like: ObjectQueries, width: int, ratio: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        count = group_size(like.count, ratio)
        self.register_buffer("embedding", torch.randn(count, width, generator=generator))
        reference = None
        if like.reference_logits is not None:
            size = like.reference_logits.shape[-1]
            reference = torch.rand(count, size, generator=generator).logit(eps=1e-3)
        self.register_buffer("reference_logits", reference)

    def forward(self, queries: ObjectQueries) -> ObjectQueries:
        """The random group; the teacher's ``queries`` are not used."""
        return ObjectQueries(self.embedding, self.reference_logits)
