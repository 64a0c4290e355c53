"""Teach-DETR (TPAMI 2023): boxes that other detectors found are one more set of objects.

The paper's: the boxes of one or several teachers of any kind supervise a DETR one to one, beside
the ground truth; no outputs, features or queries of a teacher are needed. Our choice: they are
matched with the student's own queries by the costs of ground truth, apart from it; the class target
of a matched query is the box's score s, by alpha |s - p|^gamma BCE(z, s) (the focal loss where s is
1); box terms weigh s; and all is divided by the sum of scores, so that boxes of score 1 count as
ground truth does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from d3etr.config.base import MAXIMUM
from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import TaughtMethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.losses.set_criterion import detection_problem, set_losses
from d3etr.matching.assignment import CostBlock
from d3etr.methods.base import Matches, Method, StudentOutputs, TeacherOutputs
from d3etr.structures import Targets

_NAME = "teacher_boxes"


class TeachDETRConfig(TaughtMethodConfig):
    """A teacher's boxes as objects."""

    method: Literal["teach_detr"] = "teach_detr"
    weight: Annotated[float, Field(gt=0, le=MAXIMUM)] = 1.0
    """Of all terms over the teacher's boxes; 1 counts a box of score 1 as one of ground truth."""
    minimum_score: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Boxes below it are left out: there, the teacher says that nothing is."""
    set_criterion: SetCriterionConfig = SetCriterionConfig()
    """Weights and costs over the teacher's boxes, as optimisation.set_criterion over objects; of
    classes, by the focal loss only."""

    @property
    def teacher_kinds(self) -> tuple[str, ...]:
        """Boxes in files, and no network."""
        return ("detections",)

    @property
    def learns_without_labels(self) -> bool:
        """Boxes are those of images with labels."""
        return False

    @property
    def description(self) -> str:
        """The term with its weight."""
        return f"teacher's boxes ({self.weight:g}), scores of at least {self.minimum_score:g}"

    @model_validator(mode="after")
    def _scores_are_the_class_targets(self) -> Self:
        criterion = self.set_criterion
        if criterion.class_loss != "focal":
            raise ValueError(
                f"set_criterion.class_loss '{criterion.class_loss}' has the IoU as class target, "
                "and a teacher's box has its score: set it to 'focal' (ground truth may have "
                "another, in optimisation.set_criterion)"
            )
        if key := criterion.idle_quality_key():
            raise ValueError(f"set_criterion.{key} has no effect with class_loss 'focal'")
        if key := criterion.idle_edges_key():
            raise ValueError(
                f"set_criterion.{key} has no effect: of a teacher's boxes, class, L1 and GIoU are "
                "learnt; remove it (ground truth has it in optimisation.set_criterion)"
            )
        return self


class TeachDETR(Method):
    """L = L_det(main, ground truth) + w L_det(main, teacher's boxes, soft scores)."""

    config_class = TeachDETRConfig
    takes_boxes = True

    def __init__(
        self,
        config: TeachDETRConfig,
        student: DetectorConfig,
        teacher: DetectorConfig | None = None,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.config = config

    def costs(
        self, student: StudentOutputs, teacher: TeacherOutputs, targets: Targets
    ) -> dict[str, CostBlock]:
        """The student's queries against the teacher's boxes."""
        boxes, criterion = _boxes(targets), self.config.set_criterion
        text = "student queries against the teacher's boxes"
        return {_NAME: detection_problem(text, student.main, boxes, criterion)}

    def normalisers(self, teacher: TeacherOutputs, targets: Targets) -> dict[str, Tensor]:
        """The sum of scores."""
        scores = _boxes(targets).scores
        assert scores is not None
        return {_NAME: scores.sum()}

    def losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        matches: Matches,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """W L_det over the teacher's boxes."""
        config = self.config.set_criterion
        weights = {"class": config.class_weight, "l1": config.l1_weight, "giou": config.giou_weight}
        with matches(_NAME) as assignment:
            terms = set_losses(
                student.main, _boxes(targets), assignment, normalisers[_NAME], config
            )
            weighted = {
                f"{_NAME}/{name}": self.config.weight * weights[name] * loss
                for name, loss in terms.items()
            }
            return assignment.nan_if_invalid(weighted)


def _boxes(targets: Targets) -> Targets:
    if targets.of_teacher is None:
        raise ValueError("the teacher's boxes are compared, but the batch has none")
    return targets.of_teacher
