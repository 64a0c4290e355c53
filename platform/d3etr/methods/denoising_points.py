"""Denoising queries as points: the same noised ground truth through both decoders (our choice).

A student that trains with denoising queries decodes them anyway; the teacher decodes the same, each
with its own embedding of classes, and query i of the one corresponds to query i of the other. It is
KD-DETR's idea of shared points (arXiv 2211.08071), whose points are the teacher's or random, and
CLoCKDistill's of queries made of ground truth (arXiv 2502.10683), without another embedding. In
both models blocks see themselves and the main group, as in plain training.

Shapes: L decoder layers · B images · N denoising queries in K blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from d3etr.config.base import Section
from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import Weight
from d3etr.detectors.denoising import (
    DENOISING,
    DenoisingConfig,
    denoising_blocks,
    denoising_of,
    existing_objects,
)
from d3etr.errors import UserError
from d3etr.methods.base import StudentOutputs, TeacherOutputs
from d3etr.methods.pairs import FIXED, LevelPairs, MatchedPairs, counted_confidence, pair_losses
from d3etr.structures import Targets

if TYPE_CHECKING:
    from d3etr.methods.teacher_query_config import TeacherQueryConfig

DENOISING_POINTS = "denoising_points"
"""Name of their normaliser and losses; those on ground truth are ``denoising/..``."""
_QUERIES = f"{DENOISING_POINTS}/queries"


class DenoisingPointsConfig(Section):
    """The student's denoising queries, which the teacher decodes too; pairs by index."""

    weight: Weight = 0.0
    """Of their losses relative to those of the other pairs; 0 leaves them out, and the teacher
    decodes none. For students and teachers that train with denoising queries, of any kind."""


def check_denoising(student: DetectorConfig, teacher: DetectorConfig) -> None:
    """Refuse detectors without denoising queries.

    Raises:
        UserError: names those without, and what helps.
    """
    pair = {"student": student, "teacher": teacher}
    without = [whose for whose, detector in pair.items() if denoising_of(detector) is None]
    if not without:
        return
    found = " and ".join(f"the {whose} ({pair[whose].name})" for whose in without)
    settable = "student" in without and hasattr(student, "denoising")
    more = "student.detector.denoising.queries above 0, or " if settable else ""
    raise UserError(
        "distillation.denoising_points compares denoising queries of student and teacher, and "
        f"{found} {'has' if len(without) == 1 else 'have'} none: set {more}"
        "distillation.denoising_points.weight to 0"
    )


class DenoisingPoints:
    """Which queries count, and the losses over them.

    Queries of slots without an object take part in both decoders and count nothing. An image's
    queries count 1 / K, so that an object counts the same in any batch, whatever its blocks.

    Args:
        config: of the method.
        noise: the student's denoising queries.
        layers: L.
        levels: as of ``pair_losses``.
    """

    def __init__(
        self,
        config: TeacherQueryConfig,
        noise: DenoisingConfig,
        layers: int,
        levels: LevelPairs | None,
    ) -> None:
        self._config, self._noise, self._layers, self._levels = config, noise, layers, levels

    def counted(self, targets: Targets) -> Tensor:
        """[B, N] what each query counts: 1 / K, or 0 without an object."""
        blocks, fullest = denoising_blocks(targets, self._noise)
        exists = existing_objects(targets, fullest).repeat(1, 2 * blocks)
        return exists.float() / max(1, blocks)

    def normalisers(self, teacher: TeacherOutputs, targets: Targets) -> dict[str, Tensor]:
        """[L] the teacher's confidence in these queries or the objects, and what they count."""
        counted = self.counted(targets)
        total = counted.new_zeros(self._layers)
        if self._config.normaliser == "objects":
            total = targets.num_objects.sum().float().expand_as(total)
        else:
            outputs = teacher.groups[DENOISING].outputs
            confidence = counted_confidence(outputs, self._config.minimum_confidence)
            total = (confidence * counted).sum((1, 2))
        return {DENOISING_POINTS: total, _QUERIES: counted.sum()}

    def losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """W L_denoising: all of ``pair_losses``, by index; zeros in a batch without objects."""
        pairs = MatchedPairs(
            student.groups[DENOISING],
            teacher.groups[DENOISING].outputs,
            FIXED,
            normalisers[DENOISING_POINTS],
            normalisers[_QUERIES],
            counted=self.counted(targets),
        )
        weight = self._config.denoising_weight
        return pair_losses(DENOISING_POINTS, weight, pairs, self._config, self._levels)
