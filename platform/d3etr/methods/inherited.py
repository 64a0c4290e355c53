"""Inherited Matching of two-stage detectors, whose queries are chosen in each image (our choice).

Query i of the student is not the teacher's query i there, but both are made by an encoder's token:
queries of one place, the same token of the same level, are pairs. The others are paired by minimal
cost, as in Adaptive Matching.

Shapes: L decoder layers · B images · N student queries · M teacher queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d3etr.errors import UserError
from d3etr.matching.assignment import CostBlock
from d3etr.methods.adaptive import AdaptiveMatching
from d3etr.methods.base import StudentOutputs, TeacherOutputs
from d3etr.structures import MAIN


class PlaceMatching(AdaptiveMatching):
    """Pairs queries of one place, then the rest by cost; arguments as of ``AdaptiveMatching``."""

    name = "inherited"

    def problem_of_places(self, student: StudentOutputs, teacher: TeacherOutputs) -> CostBlock:
        """The problem whose solution holds every pair of one place.

        Args:
            student: with the places of its queries.
            teacher: likewise.

        Raises:
            UserError: a detector says no places, or theirs are on other grids.
        """
        ours, theirs = student.place, teacher.groups[MAIN].queries.place
        if ours is None or theirs is None:
            who = "student" if ours is None else "teacher"
            raise UserError(
                "distillation.inherited_ratio pairs queries of one place, but the detector of the "
                f"{who} does not say where its queries are: set it to 0"
            )
        if student.memory.levels != teacher.main.levels:
            raise UserError(
                "distillation.inherited_ratio pairs queries of one place, but the student's "
                f"feature levels {list(student.memory.levels)} and the teacher's "
                f"{list(teacher.main.levels)} (height, width) differ: set it to 0, or give both "
                "backbones of the same strides"
            )
        block = self.problem(student.main, teacher.main)
        return CostBlock(block.name, same_place_first(block.costs, ours, theirs))


def same_place_first(costs: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Costs by which every assignment of minimal cost holds all pairs of one place.

    A query with a partner of its place is free with it and with anybody else dearer than a whole
    assignment can be. What is left stays an ordinary problem.

    Args:
        costs: [L, B, N, M], none below 0.
        student: [B, N] places, each once in an image.
        teacher: [B, M] likewise.
    """
    same = student[:, :, None] == teacher[:, None, :]
    taken = same.any(2, keepdim=True) | same.any(1, keepdim=True)
    dear = costs.amax().clamp(min=1.0) * sum(costs.shape[-2:])
    return torch.where(same, 0.0, torch.where(taken, dear, costs))
