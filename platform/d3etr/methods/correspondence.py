"""Which teacher query corresponds to which student query: Adaptive and Fixed Matching.

Both answer the question that DETR's unordered outputs pose (D3ETR, abstract): adaptive
correspondences are found by bipartite matching in every decoder layer, fixed ones hold by
construction because the auxiliary group's queries *are* the teacher's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from d3etr.config.distillation import MatchingCostConfig
from d3etr.matching.assignment import Assignment, CostBlock, gather_queries
from d3etr.matching.costs import distillation_costs
from d3etr.structures import DecoderOutputs


@dataclass(frozen=True)
class Correspondence:
    """Pairs of teacher and student queries, per layer and image.

    An index of None means "all queries, in order", which spares the gather.

    Attributes:
        teacher: [L, B, P] indices of teacher queries, or None.
        student: [L, B, P] indices of student queries, or None.
    """

    teacher: Tensor | None = None
    student: Tensor | None = None

    def of_teacher(self, values: Tensor) -> Tensor:
        """Select pairs: [L, B, M, K] to [L, B, P, K]."""
        return values if self.teacher is None else gather_queries(values, self.teacher)

    def of_student(self, values: Tensor) -> Tensor:
        """Select pairs: [L, B, N, K] to [L, B, P, K]."""
        return values if self.student is None else gather_queries(values, self.student)


FIXED = Correspondence()
"""Fixed Matching: query i of the auxiliary group corresponds to teacher query i."""


def adaptive_problem(
    student: DecoderOutputs, teacher: DecoderOutputs, config: MatchingCostConfig
) -> CostBlock:
    """The bipartite problems of Adaptive Matching; rows are student queries."""
    costs = distillation_costs(student, teacher, config)
    return CostBlock("student queries against teacher queries", costs)


def share_of(count: int, ratio: float) -> int:
    """``ratio`` times ``count``, rounded up, at least 1."""
    # Rounded first: 100 * 0.07 is 7.000000000000001.
    return max(1, math.ceil(round(count * ratio, 6)))


def kept_pairs(student: int, teacher: int, ratio: float) -> int:
    """Adaptive pairs per image: the matched ones times ``matched_pair_ratio``, at least 1."""
    return share_of(min(student, teacher), ratio)


def adaptive_correspondence(
    assignment: Assignment, student: DecoderOutputs, teacher: DecoderOutputs, ratio: float
) -> Correspondence:
    """Pairs of minimal total cost, the teacher's most confident share of them.

    Args:
        assignment: solution of ``adaptive_problem``.
        student: outputs of N queries.
        teacher: outputs of M queries.
        ratio: ``matched_pair_ratio`` m in (0, 1].
    """
    rows, columns = assignment.rows, assignment.columns
    kept = kept_pairs(student.queries, teacher.queries, ratio)
    if kept < rows.shape[-1]:
        confidence = teacher.confidence().gather(2, columns)
        best = confidence.topk(kept, dim=2).indices
        rows, columns = rows.gather(2, best), columns.gather(2, best)
    # Rows are ascending: as many as there are student queries means all, in order.
    return Correspondence(columns, None if kept == student.queries else rows)
