"""Which places a student selects: the teacher's encoder scores on the student's grid (our choice).

Detectors whose queries are tokens of the encoder choose them by the class scores of every token.
What a decoder learns from a teacher never reaches the scores of tokens that were not chosen; this
term does.

Shapes: B images · S student and S' teacher tokens of all levels · C classes · M teacher queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from d3etr.config.base import Section
from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import PredictionConfig, Weight
from d3etr.detectors.places import scores_on_grid
from d3etr.errors import UserError
from d3etr.losses.prediction import class_loss
from d3etr.methods.base import StudentOutputs, TeacherOutputs
from d3etr.structures import Grids, Memory, Targets, TokenScores

if TYPE_CHECKING:
    from d3etr.methods.teacher_query_config import TeacherQueryConfig

SELECTION = "selection"
"""Name of the loss and its normaliser."""
_TINY = torch.finfo(torch.float32).tiny


class SelectionConfig(Section):
    """Distillation of the class scores by which an encoder selects its queries."""

    weight: Weight = 0.0
    """Of the term in the total loss; 0 switches it off. For students and teachers whose encoder
    tells the classes of its tokens, such as ``rt_detr`` and ``d_fine``."""
    class_loss: Literal["focal", "bce"] = "focal"
    """Of each token and class; as ``prediction.class_loss``."""


def check_selection(student: DetectorConfig, teacher: DetectorConfig) -> None:
    """Refuse detectors whose encoder does not tell classes.

    Raises:
        UserError: names them.
    """
    pair = {"student": student, "teacher": teacher}
    found = [
        f"the {whose} ({detector.name})"
        for whose, detector in pair.items()
        if not detector.proposals_tell_classes
    ]
    if found:
        raise UserError(
            "distillation.selection compares the class scores by which encoders select their "
            f"queries, and {' and '.join(found)} {'has' if len(found) == 1 else 'have'} none: set "
            "distillation.selection.weight to 0"
        )


def token_scores(memory: Memory) -> TokenScores:
    """What an encoder says about every token.

    Raises:
        UserError: it says so of selected tokens only.
    """
    if memory.scores is not None:
        return memory.scores
    proposals, logits = memory.proposals, memory.proposal_logits
    if proposals is None or logits is None or proposals.queries != memory.tokens.shape[1]:
        raise UserError(
            "distillation.selection compares class scores of all of an encoder's tokens, and a "
            "detector gives none: set distillation.selection.weight to 0"
        )
    return TokenScores(proposals.logits[0], ~logits.isfinite().all(-1))


class SelectionTerm:
    """W / c sum_s sum_k |p' - p|^2 BCE(z, p') over tokens s and classes k.

    p' is the teacher's on the student's grid (``scores_on_grid``), c its confidence in the M tokens
    it would select, summed over the global batch, or the number of objects. Tokens that propose
    nothing in either model, such as those under padding, are left out.

    Args:
        config: of the method.
        selection: its section of this term.
        strides: of the student's and of the teacher's levels.
        queries: M.
    """

    def __init__(
        self,
        config: TeacherQueryConfig,
        selection: SelectionConfig,
        strides: tuple[tuple[int, ...], tuple[int, ...]],
        queries: int,
    ) -> None:
        self._config, self._weight = config, selection.weight
        self._strides, self._queries = strides, queries
        self._loss = PredictionConfig(class_loss=selection.class_loss)

    def normalisers(self, teacher: TeacherOutputs, targets: Targets) -> dict[str, Tensor]:
        """Scalar: the teacher's confidence in its best tokens, or the objects."""
        if self._config.normaliser == "objects":
            return {SELECTION: targets.num_objects.sum().float()}
        assert teacher.memory is not None
        logits, silent = token_scores(teacher.memory)
        best = logits.float().amax(-1).masked_fill(silent, float("-inf"))
        confidence = best.topk(min(self._queries, best.shape[1]), dim=1).values.sigmoid()
        counts = confidence >= self._config.minimum_confidence
        return {SELECTION: (confidence * counts).sum()}

    def losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """``selection``."""
        assert teacher.memory is not None
        ours, theirs = token_scores(student.memory), token_scores(teacher.memory)
        own, other = (
            Grids(part.levels, strides)
            for part, strides in zip((student.memory, teacher.memory), self._strides, strict=True)
        )
        target = scores_on_grid(theirs, other, own)
        counts = target.isfinite().all(-1) & ~ours.silent
        target = target.where(counts[..., None], 0.0)
        tokens = class_loss(ours.logits.float(), target, self._loss)
        least = _TINY if self._config.counts_confidence else 1.0
        total = normalisers[SELECTION].clamp(min=least)
        return {SELECTION: self._weight * (tokens * counts).sum() / total}
