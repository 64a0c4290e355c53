"""Adaptive Matching: bipartite pairs of student and teacher queries, in every decoder layer.

Shapes: L decoder layers · B images · N student queries · M teacher queries · P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from d3etr.config.distillation import MatchingCostConfig
from d3etr.matching.assignment import Assignment, CostBlock
from d3etr.methods.correspondence import (
    Correspondence,
    adaptive_correspondence,
    adaptive_problem,
)
from d3etr.methods.pairs import MatchedPairs
from d3etr.methods.selection import best_confidence
from d3etr.structures import DecoderOutputs


class AdaptiveMatching:
    """Poses the problems, and turns their solutions into pairs.

    Args:
        cost: of a pair.
        ratio: ``matched_pair_ratio``, share of the pairs that are kept.
        queries: N of the student's configuration.
    """

    def __init__(self, cost: MatchingCostConfig, ratio: float, queries: int) -> None:
        self._cost, self._ratio, self._queries = cost, ratio, queries

    def problem(self, student: DecoderOutputs, teacher: DecoderOutputs) -> CostBlock:
        """All queries of the one against all of the other."""
        return adaptive_problem(student, teacher, self._cost)

    def correspondence(
        self, assignment: Assignment, student: DecoderOutputs, teacher: DecoderOutputs
    ) -> Correspondence:
        """The pairs of a solution, those of the teacher's most confident queries."""
        return adaptive_correspondence(assignment, student, teacher, self._ratio)

    def confidence(self, teacher: DecoderOutputs) -> Tensor:
        """[L] normaliser: what the pairs will weigh, known before they are found."""
        return best_confidence(teacher, self._queries, self._ratio).sum((1, 2))

    def pairs(
        self,
        assignment: Assignment,
        student: DecoderOutputs,
        teacher: DecoderOutputs,
        normalisers: Mapping[str, Tensor],
    ) -> MatchedPairs:
        """Pairs ready to be compared.

        Args:
            assignment: solution of ``problem``.
            student: outputs of the main group.
            teacher: outputs of the teacher's own queries.
            normalisers: ``adaptive`` and ``images`` of the global batch.
        """
        index = self.correspondence(assignment, student, teacher)
        shares = best_confidence(teacher, self._queries, self._ratio).sum(2)
        return MatchedPairs(
            student, teacher, index, normalisers["adaptive"], normalisers["images"], shares
        )
