"""Adaptive Matching: bipartite pairs of student and teacher queries, in every decoder layer.

Shapes: L decoder layers · B images · N student queries · M teacher queries · P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from d3etr.config.distillation import MatchingCostConfig
from d3etr.matching.assignment import Assignment, CostBlock
from d3etr.matching.costs import distillation_costs
from d3etr.methods.pairs import Correspondence, MatchedPairs, counted_confidence
from d3etr.methods.selection import share_of
from d3etr.structures import DecoderOutputs


def kept_pairs(student: int, teacher: int, ratio: float) -> int:
    """Adaptive pairs per image: the matched ones times ``matched_pair_ratio``, at least 1."""
    return share_of(min(student, teacher), ratio)


class AdaptiveMatching:
    """Poses the problems, and turns their solutions into pairs.

    Args:
        cost: of a pair.
        ratio: ``matched_pair_ratio``, share of the pairs that are kept.
        queries: N of the student's configuration.
        minimum_confidence: of the teacher's queries that weigh anything where pairs are weighted
            by confidence.

    Attributes:
        name: of its problem, its normaliser and its losses.
    """

    name = "adaptive"

    def __init__(
        self,
        cost: MatchingCostConfig,
        ratio: float,
        queries: int,
        minimum_confidence: float = 0.0,
    ) -> None:
        self._cost, self._ratio, self._queries = cost, ratio, queries
        self._minimum_confidence = minimum_confidence

    def problem(self, student: DecoderOutputs, teacher: DecoderOutputs) -> CostBlock:
        """All queries of the one against all of the other; rows are student queries."""
        costs = distillation_costs(student, teacher, self._cost)
        return CostBlock("student queries against teacher queries", costs)

    def correspondence(
        self, assignment: Assignment, student: DecoderOutputs, teacher: DecoderOutputs
    ) -> Correspondence:
        """The pairs of a solution, those of the teacher's most confident queries."""
        rows, columns = assignment.rows, assignment.columns
        kept = kept_pairs(student.queries, teacher.queries, self._ratio)
        if kept < rows.shape[-1]:
            confidence = teacher.confidence().gather(2, columns)
            best = confidence.topk(kept, dim=2).indices
            rows, columns = rows.gather(2, best), columns.gather(2, best)
        # Rows are ascending: as many as there are student queries means all, in order.
        return Correspondence(columns, None if kept == student.queries else rows)

    def confidence(self, teacher: DecoderOutputs) -> Tensor:
        """[L] normaliser: what the pairs will weigh, known before they are found."""
        return self._best_confidence(teacher).sum((1, 2))

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
            normalisers: of the global batch; its own and ``images``.
        """
        index = self.correspondence(assignment, student, teacher)
        shares = self._best_confidence(teacher).sum(2)
        return MatchedPairs(
            student, teacher, index, normalisers[self.name], normalisers["images"], shares
        )

    def _best_confidence(self, teacher: DecoderOutputs) -> Tensor:
        """[L, B, P] the teacher's confidence in as many of its queries as there will be pairs.

        The most confident ones, known before any pair is found: what an image brings into the
        normaliser. Where every teacher query is matched they are the pairs; where the student has
        fewer queries, weights of an image's pairs are scaled to sum to theirs (our choice), so
        that those of the global batch sum to 1 however it is cut.
        """
        kept = kept_pairs(self._queries, teacher.queries, self._ratio)
        return counted_confidence(teacher, self._minimum_confidence).topk(kept, dim=2).values
