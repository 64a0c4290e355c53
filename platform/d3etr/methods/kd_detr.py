"""KD-DETR (arXiv 2211.08071): the same points through both decoders, compared one by one.

Specific points are the teacher's queries, general ones are drawn anew in each step; a point is the
same query in both models (section 3.2). Temperature, weights and the last teacher layer for all:
the authors' code. There, the class term is a sum over points; here all terms are divided by the
teacher's confidence.

Shapes: L decoder layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal, Self

from pydantic import model_validator
from torch import Tensor

from d3etr.config.distillation import (
    AttentionConfig,
    AuxiliaryGroupConfig,
    CrossAttentionConfig,
    FeatureConfig,
    GeneralPointsConfig,
    LayerList,
    PredictionConfig,
)
from d3etr.methods.base import Matches, StudentOutputs, TeacherOutputs
from d3etr.methods.denoising_points import DenoisingPointsConfig
from d3etr.methods.encoder_selection import SelectionConfig
from d3etr.methods.teacher_queries import TeacherQueryMethod
from d3etr.methods.teacher_query_config import TeacherQueryConfig
from d3etr.structures import Targets


class KDDETRConfig(TeacherQueryConfig):
    """KD-DETR: points and loss terms."""

    implied: ClassVar[Mapping[str, object]] = MappingProxyType(
        {"adaptive_ratio": 0.0, "features": FeatureConfig().model_dump(mode="json")}
    )

    method: Literal["kd_detr"] = "kd_detr"
    general_points: GeneralPointsConfig = GeneralPointsConfig(count=300)
    denoising_points: DenoisingPointsConfig = DenoisingPointsConfig()
    """Denoising queries as further points; not KD-DETR's."""
    selection: SelectionConfig = SelectionConfig()
    """The encoder's class scores on top; not KD-DETR's."""
    layer_map: Literal["uniform", "last"] | LayerList = "last"
    """Teacher layer for each student layer; a list names them, last must map to last."""
    prediction: PredictionConfig = PredictionConfig(
        weight=1.0,
        class_loss="kl",
        temperature=10.0,
        class_weight=1.0,
        class_pair_weights="confidence",
    )
    self_attention: AttentionConfig = AttentionConfig(weight=0.0)
    """Not KD-DETR's."""
    cross_attention: CrossAttentionConfig = CrossAttentionConfig(weight=0.0)
    """Not KD-DETR's."""
    auxiliary_group: AuxiliaryGroupConfig = AuxiliaryGroupConfig(ground_truth=False)

    @model_validator(mode="after")
    def _points_have_an_effect(self) -> Self:
        if self.general_points.count and not self.distils:
            raise ValueError("general_points have no effect: all term weights are 0")
        return self

    def random_group_problem(self) -> str | None:
        """Specific points are the teacher's queries."""
        if self.auxiliary_group.queries == "random":
            return "random auxiliary queries are no points of KD-DETR: use method 'd3etr'"
        return None


class KDDETR(TeacherQueryMethod):
    """L = L_det(main) + L_specific + w_general L_general.

    Each is class and box losses over its points (``pair_losses``); the specific points' terms are
    named ``fixed``. With ``denoising_points`` (our choice) there is w_denoising L_denoising too.
    """

    config_class = KDDETRConfig

    def losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        matches: Matches,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """L_specific + w_general L_general + w_denoising L_denoising."""
        if not self.config.distils:
            return {}
        specific = self.fixed_losses(1.0, student, teacher, normalisers)
        general = self.general_losses(student, teacher, normalisers)
        added = self.added_losses(student, teacher, targets, normalisers)
        return specific | general | added
