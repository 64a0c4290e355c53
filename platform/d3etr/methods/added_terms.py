"""What a method may add to its own terms: features, denoising points, encoders' scores.

Shapes: L decoder layers.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.denoising import denoising_of
from d3etr.losses.features import FeatureComparison
from d3etr.methods.base import AddedTerm, Method, StudentOutputs, TeacherOutputs
from d3etr.methods.compatibility import shared_levels, strides_of
from d3etr.methods.denoising_points import DenoisingPoints
from d3etr.methods.encoder_selection import SelectionTerm
from d3etr.methods.selection import teacher_layers
from d3etr.methods.teacher_query_config import TeacherQueryConfig
from d3etr.structures import Targets


class AddingMethod(Method):
    """Builds what the configuration adds.

    Args:
        config: of the method; what it has no section for is not built.
        student: the student's architecture.
        teacher: the teacher's.

    Attributes:
        levels: numbers of the feature levels that maps are compared over, as of ``pair_losses``.
        features: compares memories; None unless asked for.
    """

    def __init__(
        self, config: TeacherQueryConfig, student: DetectorConfig, teacher: DetectorConfig
    ) -> None:
        super().__init__()
        self.config = config
        depths = student.decoder_layers, teacher.decoder_layers
        self.layers = teacher_layers(config.layer_map, *depths)
        self.levels = shared_levels(student, teacher) if config.cross_attention.weight else None
        self.features: FeatureComparison | None = None
        if (compared := config.compared_features) is not None:
            self.features = FeatureComparison(student.width, teacher.width, compared.queries)
            self.needs_features = True
        self._added: list[AddedTerm] = []
        if (noise := denoising_of(student)) is not None and config.denoising_weight:
            self.denoising = noise
            self._added.append(DenoisingPoints(config, noise, len(self.layers), self.levels))
        if (selection := config.selects) is not None:
            self.needs_scores = True
            strides = strides_of(student), strides_of(teacher)
            self._added.append(SelectionTerm(config, selection, strides, teacher.queries))

    def added_normalisers(self, teacher: TeacherOutputs, targets: Targets) -> dict[str, Tensor]:
        """What the added terms are divided by."""
        sums: dict[str, Tensor] = {}
        for term in self._added:
            sums |= term.normalisers(teacher, targets)
        return sums

    def added_losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Over denoising points, and of encoders' scores."""
        losses: dict[str, Tensor] = {}
        for term in self._added:
            losses |= term.losses(student, teacher, targets, normalisers)
        return losses

    def feature_losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """W L_features: over memory tokens."""
        config = self.config.compared_features
        if self.features is None or config is None:
            return {}
        assert teacher.memory is not None
        distance = self.features(
            student.memory,
            teacher.main,
            teacher.memory.tokens,
            targets,
            normalisers["labelled_images"],
        )
        return {"features": config.weight * distance}
