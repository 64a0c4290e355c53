"""Feature distillation as industry does it: a linear map, then 1 - cosine of each memory token.

RT-DETRv4 (arXiv 2510.25257) compares the encoder's map of the largest stride (F5) with another
network's tokens after a linear map; Ultralytics distils neck maps by the same distance. The weight
of 5 and the steering of the weight are RT-DETRv4's. The other network is a foundation model's ViT
(``teacher.features``, as theirs) or a teacher detector (our choice), whose tokens come from behind
its encoder.

No queries take part, so the teacher's decoder does not run, and detectors of any two kinds fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from d3etr.config.base import MAXIMUM
from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import EncoderShareConfig, TaughtMethodConfig
from d3etr.detectors.foundation import FoundationConfig
from d3etr.losses.features import cosine_loss, resize_tokens
from d3etr.methods.base import Matches, Method, StudentOutputs, TeacherOutputs
from d3etr.structures import Targets


class FeatureCosineConfig(TaughtMethodConfig):
    """Cosine distance of the encoders' outputs."""

    method: Literal["feature_cosine"] = "feature_cosine"
    weight: Annotated[float, Field(gt=0, le=MAXIMUM)] = 5.0
    """Of 1 - cosine, the mean over tokens. RT-DETRv4: 5 (S, M), 15 (L), 20 (X)."""
    levels: Literal["last", "every"] = "last"
    """Feature levels that are compared. last: that of the largest stride, which is all where there
    is one. every: each with the teacher's level of the nearest grid."""
    gradient_share: EncoderShareConfig | None = None
    """Steer the weight by the encoder's share of the gradient; None leaves it."""

    @property
    def description(self) -> str:
        """The term with its weight."""
        return f"cosine of features ({self.weight:g})"

    @property
    def teacher_kinds(self) -> tuple[str, ...]:
        """A detector, or a foundation model."""
        return ("weights", "features")

    def student_problem(self, student: DetectorConfig) -> str | None:
        """The gradient of an encoder that is not there has no share."""
        if self.gradient_share is None or student.encoder_layers:
            return None
        return (
            "distillation.gradient_share steers by the encoder's share of the gradient, but "
            "student.detector.encoder_layers is 0: remove it, or give the student a layer"
        )


class FeatureCosine(Method):
    """L = L_det(main) + w mean_s (1 - cos(A t_s + a, t'_s)) over valid memory tokens s.

    A is a linear map that only training has; t' is the teacher's memory on the student's grid.
    """

    config_class = FeatureCosineConfig
    needs_teacher_outputs = True
    needs_features = True
    needs_decoder = False

    def __init__(
        self,
        config: FeatureCosineConfig,
        student: DetectorConfig,
        teacher: DetectorConfig | FoundationConfig,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.adapter = nn.Linear(student.width, teacher.width)

    def losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        matches: Matches,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """W (1 - cos), the mean over valid tokens of each image and over images."""
        ours, theirs = student.memory, teacher.memory
        assert theirs is not None
        levels = ours.levels if self.config.levels == "every" else ours.levels[-1:]
        count = sum(height * width for height, width in levels)
        padding = None if ours.padding is None else ours.padding[:, -count:]
        target = resize_tokens(theirs.tokens.float(), theirs.padding, theirs.levels, levels)
        mapped = self.adapter(ours.tokens[:, -count:].float())
        loss = self.config.weight * cosine_loss(mapped, target, padding, normalisers["images"])
        return {"features": loss}
