"""Box distributions: a D-FINE teaches a D-FINE where edges are, over D3ETR's pairs (our choice).

A box of these detectors is four distributions over how far the edges of its first box move (D-FINE,
arXiv 2410.13842). Bins mean the same only where that box is the same. Fixed Matching makes it so:
the group of the teacher's queries moves the edges of the teacher's first boxes, and each of its
distributions learns from the teacher's by D-FINE's own self-distillation (DDF). Over adaptive and
inherited pairs first boxes differ: there the teacher's edges become targets of two bins on the
student's own grid, by D-FINE's localisation loss (FGL). Temperature, weighting and balance are
D-FINE's; that a teacher takes the place of the last layer, and of the object's box, is ours.

Shapes: L decoder layers · B images · N queries of the group · P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from d3etr.config.base import MAXIMUM
from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import (
    AttentionConfig,
    CrossAttentionConfig,
    MethodConfig,
    PredictionConfig,
    Weight,
)
from d3etr.config.training import SetCriterionConfig
from d3etr.errors import UserError
from d3etr.losses.box_distributions import (
    TEMPERATURE,
    QueryCounts,
    balanced_sum,
    distillation_terms,
    edge_loss,
    pair_overlaps,
)
from d3etr.losses.set_criterion import detection_problem
from d3etr.matching.assignment import CostBlock
from d3etr.matching.boxes import cxcywh_to_xyxy, iou
from d3etr.methods.base import Matches, StudentOutputs, TeacherOutputs
from d3etr.methods.d3etr import D3ETR, D3ETRConfig
from d3etr.methods.pairs import MatchedPairs, counted_confidence
from d3etr.methods.teacher_queries import AUXILIARY
from d3etr.structures import QueryGroup, Targets

OF_TEACHER = "distribution"
"""The problem of the teacher's queries against objects, and the loss that needs its solution."""
_MATCHED, _OTHERS = f"{OF_TEACHER}/matched", f"{OF_TEACHER}/others"
"""Normalisers: the teacher's queries with an object and without one, of one layer."""


class DistributionConfig(D3ETRConfig):
    """Distributions over edges: weights of both terms; pairs and ratios as of d3etr."""

    # Frozen, so that another name does no harm.
    method: Literal["distribution"] = "distribution"  # type: ignore[assignment]
    distribution_weight: Weight = 3.0
    """Of the divergence of distributions from the teacher's, over the group of its queries; 0
    switches it off. At adaptive_ratio 0.5 it counts as D-FINE's own ``ddf_weight``."""
    temperature: Annotated[float, Field(gt=0, le=MAXIMUM)] = TEMPERATURE
    """Of that divergence; larger is softer."""
    edge_weight: Weight = 0.3
    """Of the teacher's edges as targets over adaptive and inherited pairs; 0 switches it off. At
    adaptive_ratio 0.5 it counts as D-FINE's own ``fgl_weight``."""
    prediction: PredictionConfig = PredictionConfig(l1_weight=0.0, giou_weight=0.0)
    """Classes; boxes are learnt as distributions."""
    self_attention: AttentionConfig = AttentionConfig(weight=0.0)
    """Off unless set."""
    cross_attention: CrossAttentionConfig = CrossAttentionConfig(weight=0.0)
    """Off unless set."""

    @property
    def compares_distributions(self) -> bool:
        """Whether distributions of the group are compared bin by bin."""
        return bool(self.fixed_share and self.distribution_weight)

    @property
    def compares_edges(self) -> bool:
        """Whether the teacher's edges are targets over pairs."""
        return bool(self._has_pairs and self.edge_weight)

    @property
    def _has_pairs(self) -> bool:
        return self._mixes_adaptive or bool(self.inherited_ratio)

    @property
    def compares_pairs(self) -> bool:
        """Whether any term over pairs is on."""
        return super().compares_pairs or self.compares_distributions or self.compares_edges

    @property
    def kinds_of_pair_weights(self) -> frozenset[str]:
        """Edges are weighted by confidence, as all queries that no object is matched with."""
        return super().kinds_of_pair_weights | {"confidence"}

    @property
    def description(self) -> str:
        """The terms over pairs, and over distributions with their weights."""
        terms = [super().description]
        if self.compares_distributions:
            terms.append(f"distributions ({self.distribution_weight:g})")
        if self.compares_edges:
            terms.append(f"edges ({self.edge_weight:g})")
        return ", ".join(terms)

    @property
    def _switched_off(self) -> dict[str, str]:
        off = super()._switched_off
        if not self.fixed_share:
            reason = f"{self._whole_ratio} 1 compares nothing over the teacher's queries"
            off |= dict.fromkeys(("distribution_weight", "temperature"), reason)
        elif not self.distribution_weight:
            off["temperature"] = "distribution_weight 0 compares no distributions"
        if not self._has_pairs:
            off["edge_weight"] = "adaptive_ratio 0 makes no pairs"
        return off

    def random_group_problem(self) -> str | None:
        """Distributions are those of the teacher's queries."""
        if self.auxiliary_group.queries == "random":
            return "random auxiliary queries have no teacher's distributions: use method 'd3etr'"
        return None

    def student_problem(self, student: DetectorConfig) -> str | None:
        """A student whose boxes are no distributions."""
        return None if student.edge_bins else _without_bins("student", student)

    @model_validator(mode="after")
    def _distributions_are_compared(self) -> Self:
        if not (self.compares_distributions or self.compares_edges):
            raise ValueError(
                "no distributions and no edges are compared: raise distribution_weight or "
                "edge_weight, or use method 'd3etr'"
            )
        everywhere = super().compares_pairs
        if self._has_pairs and not (everywhere or self.edge_weight):
            raise ValueError(
                "nothing is compared over adaptive or inherited pairs: set both ratios to 0, or "
                "raise edge_weight"
            )
        if self.fixed_share and not (everywhere or self.distribution_weight):
            raise ValueError(
                "nothing is compared over the teacher's queries: set adaptive_ratio to 1, or raise "
                "distribution_weight"
            )
        if self.refine_teacher:
            raise ValueError(
                "refine_teacher changes the teacher's boxes and scores and leaves its "
                "distributions: set it to false"
            )
        if self.general_points.count:
            raise ValueError(
                "general_points are no pairs of this method: remove them, or use method 'd3etr'"
            )
        return self


def _without_bins(whose: str, detector: DetectorConfig) -> str:
    return (
        "distillation.method 'distribution' compares distributions over the edges of boxes, and "
        f"the {whose} ({detector.name}) has none: use 'd_fine' or 'deimv2' for both detectors, "
        "or method 'd3etr'"
    )


class Distribution(D3ETR):
    """L as of D3ETR, where L_fixed has a divergence on top, and L_adaptive and L_inherited edges.

    L_fixed += w_D sum_l (s / M sum_matched IoU(b', y) KL + (1 - s) / U sum_others p' KL), the mean
    over edges of KL = T^2 KL(softmax(z' / T) || softmax(z / T)); M of the group's queries are
    matched with objects y by the teacher's boxes b', U are not and weigh as much as the teacher is
    sure of them, and s = sqrt(M) / (sqrt(M) + sqrt(U)).

    L_adaptive += w_E sum_l sum_pairs c IoU(b, b') sum_edges CE(z, the two bins around the edge of
    b'), with the teacher's confidence c, normalised.
    """

    config: DistributionConfig
    config_class = DistributionConfig  # type: ignore[assignment]

    def __init__(
        self,
        config: DistributionConfig,
        student: DetectorConfig,
        teacher: DetectorConfig,
        *,
        seed: int,
    ) -> None:
        super().__init__(config, student, teacher, seed=seed)
        self._criterion = SetCriterionConfig()
        self.needs_distributions = config.compares_distributions
        # The group starts from boxes of the teacher's outputs.
        self.groups_need_images |= config.compares_distributions

    @classmethod
    def check_compatible(
        cls, config: MethodConfig, student: DetectorConfig, teacher: DetectorConfig, classes: int
    ) -> None:
        """Refuse boxes that are no distributions, and bins that cannot be compared one by one."""
        assert isinstance(config, DistributionConfig)
        for whose, detector in {"student": student, "teacher": teacher}.items():
            if not detector.edge_bins:
                raise UserError(_without_bins(whose, detector))
        super().check_compatible(config, student, teacher, classes)
        ours, theirs = student.edge_bins, teacher.edge_bins
        if config.compares_distributions and ours != theirs:
            other = {key: value for key, value in theirs.items() if ours.get(key) != value}
            found = ", ".join(f"{key} {ours.get(key):g} and {other[key]:g}" for key in other)
            helps = " and ".join(f"student.detector.{k} to {v:g}" for k, v in other.items())
            raise UserError(
                "distillation.distribution_weight compares distributions bin by bin, but those of "
                f"student and teacher differ ({found}): set {helps}, or "
                "distillation.adaptive_ratio to 1, where the teacher's edges are targets on the "
                "student's own bins"
            )

    def student_groups(
        self, teacher: TeacherOutputs, targets: Targets, step: int
    ) -> dict[str, QueryGroup]:
        """The auxiliary group, which moves the edges of the teacher's first boxes."""
        groups = super().student_groups(teacher, targets, step)
        if self.config.compares_distributions and AUXILIARY in teacher.groups:
            group, edges = groups[AUXILIARY], teacher.groups[AUXILIARY].outputs.distributions
            assert edges is not None
            queries = replace(group.queries, start=edges.start)
            groups[AUXILIARY] = replace(group, queries=queries)
        return groups

    def costs(
        self, student: StudentOutputs, teacher: TeacherOutputs, targets: Targets
    ) -> dict[str, CostBlock]:
        """D3ETR's, and the teacher's queries of the group against objects."""
        problems = super().costs(student, teacher, targets)
        if self.config.compares_distributions and AUXILIARY in teacher.groups:
            outputs, name = teacher.groups[AUXILIARY].outputs, "teacher queries against objects"
            problems[OF_TEACHER] = detection_problem(name, outputs, targets, self._criterion)
        return problems

    def normalisers(self, teacher: TeacherOutputs, targets: Targets) -> dict[str, Tensor]:
        """D3ETR's; queries of the group that have an object, and that have none or no labels."""
        sums = super().normalisers(teacher, targets)
        if self.config.compares_distributions and AUXILIARY in teacher.groups:
            queries, objects = teacher.groups[AUXILIARY].outputs.queries, targets.num_objects
            matched = objects.clamp(max=queries).sum().float()
            sums |= {_MATCHED: matched, _OTHERS: len(objects) * queries - matched}
        return sums

    def losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        matches: Matches,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """D3ETR's, and the divergence of the group's distributions from the teacher's."""
        terms = super().losses(student, teacher, matches, targets, normalisers)
        if not (self.config.compares_distributions and AUXILIARY in teacher.groups):
            return terms
        theirs = teacher.groups[AUXILIARY].outputs
        ours, edges = student.groups[AUXILIARY].distributions, theirs.distributions
        assert ours is not None and edges is not None
        confidence = counted_confidence(theirs, self.config.minimum_confidence)
        counts = QueryCounts.balanced(normalisers[_MATCHED], normalisers[_OTHERS])
        with matches(OF_TEACHER) as pairs:
            overlaps = pair_overlaps(theirs, targets, pairs)
            divergence = distillation_terms(
                ours.corners.float(), edges.corners.float(), self.config.temperature
            )
            used = pairs.rows, pairs.valid_mask, overlaps
            loss = balanced_sum(divergence, *used, confidence, counts)
            weight = self.config.fixed_share * self.config.distribution_weight
            return terms | pairs.nan_if_invalid({f"{OF_TEACHER}/kl": weight * loss})

    def pair_terms(self, name: str, weight: float, pairs: MatchedPairs) -> dict[str, Tensor]:
        """D3ETR's, and the teacher's edges where first boxes differ: over all but fixed pairs."""
        terms = super().pair_terms(name, weight, pairs)
        if name == "fixed" or not self.config.edge_weight:
            return terms
        edges, index = pairs.student.distributions, pairs.index
        assert edges is not None
        targets = index.of_teacher(pairs.teacher.boxes_cxcywh).float()
        boxes = index.of_student(pairs.student.boxes_cxcywh).detach().float()
        overlaps = iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))
        weights = overlaps * pairs.weights("confidence", self.config)
        loss = edge_loss(edges, index.student, targets, weights)
        return terms | {f"{name}/edges": weight * self.config.edge_weight * loss}
