"""QSKD (arXiv 2409.06443): pairs through the ground truth that both match, and hard negatives.

A query of the student and one of the teacher that are matched with the same object are a pair of
positives. Hard negatives are unmatched queries whose box has GIoU > 0 with some object: those that
nearly found it, paired among themselves. The weights 1, 5 and 2 of class, L1 and GIoU are those of
a public port. Our choices: hard negatives are paired in one problem with all queries near objects,
and pairs that hold a positive are dropped, so that no problem waits for another; positives are
divided by the number of objects, hard negatives by the teacher's number of queries near objects;
the teacher is matched with objects by this configuration's costs of Conditional DETR. The paper's
attention-guided features are not here.

Shapes: L decoder layers · B images · N student queries · M teacher queries · T objects · P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import (
    LayerList,
    MatchingCostConfig,
    MethodConfig,
    PredictionConfig,
    PredictionMethodConfig,
    Weight,
)
from d3etr.config.training import SetCriterionConfig
from d3etr.losses.prediction import prediction_losses
from d3etr.losses.set_criterion import detection_problem
from d3etr.matching.assignment import Assignment, CostBlock, gather_queries, matched_objects
from d3etr.matching.boxes import cxcywh_to_xyxy, pairwise_generalised_iou
from d3etr.matching.costs import distillation_costs
from d3etr.methods.base import Matches, Method, StudentOutputs, TeacherOutputs
from d3etr.methods.refinement import TeacherRefinement, check_refinement
from d3etr.methods.selection import teacher_layers
from d3etr.structures import DecoderOutputs, Targets

POSITIVE, OF_TEACHER, NEGATIVE = "positive", "positive_teacher", "negative"
"""Problems: the student's queries against objects, the teacher's, and one against the other."""
_APART = 1e3
"""Added to the cost of a pair that holds no two queries near objects: above any other cost."""


class QSKDConfig(PredictionMethodConfig):
    """QSKD: weights of positives and hard negatives, and of the losses over them."""

    method: Literal["qskd"] = "qskd"
    positive_weight: Weight = 1.0
    """Of pairs that are matched with the same object; 0 switches them off."""
    negative_weight: Weight = 1.0
    """Of pairs of hard negatives; 0 switches them off."""
    class_weight: Weight = 1.0
    """Of the class loss, a binary cross entropy with the teacher's probabilities as targets."""
    l1_weight: Weight = 5.0
    """Weight of the L1 distance of boxes."""
    giou_weight: Weight = 2.0
    """Weight of 1 - GIoU of boxes."""
    layer_map: Literal["uniform", "last"] | LayerList = "uniform"
    """Teacher layer for each student layer; a list names them, last must map to last."""

    @property
    def learns_without_labels(self) -> bool:
        """Both kinds of pairs are found by objects."""
        return False

    @property
    def description(self) -> str:
        """Both kinds of pairs with their weights."""
        pairs = f"positives ({self.positive_weight:g}), hard negatives ({self.negative_weight:g})"
        return f"{pairs}{', teacher refined' * self.refine_teacher}"

    @model_validator(mode="after")
    def _something_is_compared(self) -> Self:
        if not (self.positive_weight or self.negative_weight):
            raise ValueError("positive_weight and negative_weight are both 0: use method 'none'")
        if not (self.class_weight or self.l1_weight or self.giou_weight):
            raise ValueError("class_weight, l1_weight and giou_weight are all 0: use method 'none'")
        return self


@torch.no_grad()
def near_objects(outputs: DecoderOutputs, targets: Targets) -> Tensor:
    """[L, B, N] bool: which queries' boxes have GIoU > 0 with an object of their image."""
    boxes, truth = (cxcywh_to_xyxy(x) for x in (outputs.boxes_cxcywh, targets.boxes_cxcywh))
    overlap = pairwise_generalised_iou(boxes.float(), truth[None])
    slots = torch.arange(truth.shape[1], device=truth.device)
    exists = slots < targets.num_objects[:, None]
    return ((overlap > 0) & exists[None, :, None]).any(-1)


def queries_of_objects(assignment: Assignment, objects: int) -> tuple[Tensor, Tensor]:
    """The query that is matched with each object, [L, B, T], and whether there is one.

    Args:
        assignment: queries (rows) to objects (columns).
        objects: T.
    """
    used = assignment.valid_mask[None].expand_as(assignment.rows)
    # Unused slots go to a column of their own.
    columns = assignment.columns.where(used, objects)
    empty = assignment.rows.new_zeros(*assignment.rows.shape[:2], objects + 1)
    queries = empty.scatter(2, columns, assignment.rows)
    return queries[..., :-1], empty.bool().scatter(2, columns, used)[..., :-1]


class QSKD(Method):
    """L = L_det(main) + w+ L_positive + w- L_negative.

    Each L is class BCE + 5 L1 + 2 (1 - GIoU) over its pairs.
    """

    config_class = QSKDConfig
    needs_teacher_outputs = True

    def __init__(
        self, config: QSKDConfig, student: DetectorConfig, teacher: DetectorConfig, *, seed: int
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = teacher_layers(
            config.layer_map, student.decoder_layers, teacher.decoder_layers
        )
        if config.refine_teacher:
            self.refinement = TeacherRefinement(self.layers)
        self._prediction = PredictionConfig(
            class_loss="bce",
            class_weight=config.class_weight,
            l1_weight=config.l1_weight,
            giou_weight=config.giou_weight,
        )
        self._cost = MatchingCostConfig(class_distance="bce", class_cost=1.0)
        self._criterion = SetCriterionConfig()

    @classmethod
    def check_compatible(
        cls, config: MethodConfig, student: DetectorConfig, teacher: DetectorConfig, classes: int
    ) -> None:
        """Refuse a map of layers that does not fit, and what cannot be refined."""
        assert isinstance(config, QSKDConfig)
        depths = student.decoder_layers, teacher.decoder_layers
        layers = teacher_layers(config.layer_map, *depths)
        if config.refine_teacher:
            check_refinement(layers, teacher)

    def costs(
        self, student: StudentOutputs, teacher: TeacherOutputs, targets: Targets
    ) -> dict[str, CostBlock]:
        """Both sides' queries against objects, and those near objects against each other."""
        of_student, of_teacher = (
            detection_problem(f"{whose} queries against objects", outputs, targets, self._criterion)
            for whose, outputs in (("student", student.main), ("teacher", teacher.main))
        )
        problems = {POSITIVE: of_student, OF_TEACHER: of_teacher}
        if self.config.negative_weight:
            near = [near_objects(part.main, targets) for part in (student, teacher)]
            apart = ~(near[0][..., None] & near[1][..., None, :])
            costs = distillation_costs(student.main, teacher.main, self._cost) + _APART * apart
            problems[NEGATIVE] = CostBlock("student queries against teacher queries", costs)
        return problems

    def normalisers(self, teacher: TeacherOutputs, targets: Targets) -> dict[str, Tensor]:
        """[L] queries of the teacher that are near objects."""
        if not self.config.negative_weight:
            return {}
        return {NEGATIVE: near_objects(teacher.main, targets).sum((1, 2)).float()}

    def losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        matches: Matches,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """W+ L_positive + w- L_negative."""
        terms: dict[str, Tensor] = {}
        outputs = student.main, teacher.main
        with matches(POSITIVE) as ours, matches(OF_TEACHER) as theirs:
            if self.config.positive_weight:
                objects = normalisers["objects"].clamp(min=1)
                terms |= self._positive(outputs, (ours, theirs), targets, objects)
            if self.config.negative_weight:
                hard = [
                    near_objects(part, targets) & (matched_objects(assignment, part.queries) < 0)
                    for part, assignment in zip(outputs, (ours, theirs), strict=True)
                ]
                with matches(NEGATIVE) as others:
                    count = normalisers[NEGATIVE].clamp(min=1)
                    terms |= self._negative(outputs, others, hard, count)
            return theirs.nan_if_invalid(ours.nan_if_invalid(terms))

    def _positive(
        self,
        outputs: tuple[DecoderOutputs, DecoderOutputs],
        assignments: tuple[Assignment, Assignment],
        targets: Targets,
        objects: Tensor,
    ) -> dict[str, Tensor]:
        """Over queries that are matched with the same object, divided by the number of objects."""
        slots = targets.labels.shape[1]
        (rows, found), (columns, known) = (queries_of_objects(x, slots) for x in assignments)
        terms = self._terms(outputs, rows, columns, (found & known) / objects)
        return {f"{POSITIVE}/{k}": self.config.positive_weight * loss for k, loss in terms.items()}

    def _negative(
        self,
        outputs: tuple[DecoderOutputs, DecoderOutputs],
        assignment: Assignment,
        hard: list[Tensor],
        count: Tensor,
    ) -> dict[str, Tensor]:
        """Over pairs of two hard negatives, [L, B, N] and [L, B, M], divided by ``count`` [L]."""
        rows, columns = assignment.rows, assignment.columns
        both = hard[0].gather(2, rows) & hard[1].gather(2, columns) & assignment.valid_mask
        terms = self._terms(outputs, rows, columns, both / count[:, None, None])
        terms = {f"{NEGATIVE}/{k}": self.config.negative_weight * x for k, x in terms.items()}
        return assignment.nan_if_invalid(terms)

    def _terms(
        self,
        outputs: tuple[DecoderOutputs, DecoderOutputs],
        rows: Tensor,
        columns: Tensor,
        share: Tensor,
    ) -> dict[str, Tensor]:
        """Losses over pairs of student rows and teacher columns, of weight ``share`` [L, B, P]."""
        student, teacher = outputs
        return prediction_losses(
            gather_queries(student.logits, rows).float(),
            gather_queries(student.boxes_cxcywh, rows).float(),
            gather_queries(teacher.logits, columns).float(),
            gather_queries(teacher.boxes_cxcywh, columns).float(),
            share,
            share,
            self._prediction,
        )
