"""Configuration of what is distilled, over which pairs, and how strongly."""

from collections.abc import Mapping
from math import ceil
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from d3etr.config.base import MAXIMUM, Section
from d3etr.config.detector import DetectorConfig
from d3etr.config.overrides import merge
from d3etr.config.training import warmup_problem
from d3etr.config.variants import VariantSection
from d3etr.registry import METHODS

LayerList = tuple[Annotated[int, Field(ge=0, le=MAXIMUM)], ...]
Weight = Annotated[float, Field(ge=0, le=MAXIMUM)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class MatchingCostConfig(Section):
    """Cost of pairing a student query with a teacher query (Adaptive Matching)."""

    class_distance: Literal["l2", "bce"] = "l2"
    """l2: distance of class probabilities. bce: cross entropy with the teacher's as target."""
    class_cost: Weight = 2.0
    """Weight of the class distance."""
    l1_cost: Weight = 5.0
    """Weight of the L1 distance of boxes."""
    giou_cost: Weight = 2.0
    """Weight of 1 - GIoU of boxes."""

    @model_validator(mode="after")
    def _something_costs(self) -> Self:
        if self.class_cost == self.l1_cost == self.giou_cost == 0:
            raise ValueError("all matching costs are 0: no pair would be better than another")
        return self


class PredictionConfig(Section):
    """Distillation of class logits and boxes."""

    weight: Weight = 2.0
    """Of the whole term in the total loss; 0 switches it off."""
    class_loss: Literal["focal", "bce", "kl"] = "focal"
    """focal: |p' - p|^2 BCE(z, p'). bce: soft-target BCE. kl: softmax KL with temperature. p are a
    detector's class probabilities and z their logits, log(p / (1 - p)), with ``classification:
    softmax`` too; "no object" is what they leave, and kl, which compares shares of z, misses it."""
    temperature: Annotated[float, Field(gt=0, le=MAXIMUM)] = 1.0
    """Used by ``kl`` only."""
    class_weight: Weight = 4.0
    """Weight of the class loss within the term."""
    l1_weight: Weight = 5.0
    """Weight of the L1 distance of boxes within the term."""
    giou_weight: Weight = 2.0
    """Weight of 1 - GIoU of boxes within the term."""
    pair_weights: Literal["confidence", "uniform"] = "confidence"
    """Of boxes. confidence: a pair counts as much as the teacher is sure of its query."""
    class_pair_weights: Literal["every", "confidence", "uniform"] = "every"
    """Of classes. every: each pair counts 1 and the sum is divided by the teacher's total
    confidence, as the focal loss is by the number of objects; a query that says "nothing here"
    teaches as much about classes as one that is sure."""

    layers: Literal["sum", "mean"] = "sum"
    """Over decoder layers. sum: as the detection losses of all layers are added (DETR). mean: as
    attention terms by default, so that their relative weight is the same at any depth."""

    @property
    def kinds_of_pair_weights(self) -> frozenset[str]:
        """How pairs are weighted, by any loss of the term that is on."""
        boxes = {self.pair_weights} if self.l1_weight or self.giou_weight else set[str]()
        return frozenset(boxes | ({self.class_pair_weights} if self.class_weight else set[str]()))

    @model_validator(mode="after")
    def _temperature_has_effect(self) -> Self:
        if self.temperature != 1 and self.class_loss != "kl":
            raise ValueError(
                f"temperature has no effect on class_loss '{self.class_loss}', only on 'kl'"
            )
        if self.weight and not (self.class_weight or self.l1_weight or self.giou_weight):
            raise ValueError("weight is set but class_weight, l1_weight and giou_weight are all 0")
        return self


class AttentionConfig(Section):
    """Distillation of one kind of attention map; the mean over heads and pairs."""

    weight: Weight = 2.0
    """Of the term in the total loss; 0 switches it off."""
    distance: Literal["kl", "mse"] = "kl"
    """Between two attention maps. kl: Kullback-Leibler divergence of each row. mse: mean squared
    difference."""
    heads: Literal["per_head", "mean"] = "per_head"
    """per_head needs equal head counts; mean compares the mean over heads."""
    pair_weights: Literal["confidence", "uniform"] = "uniform"
    """confidence: a pair counts as much as the teacher is sure of its query. uniform: all pairs
    count the same."""
    layers: Literal["sum", "mean"] = "mean"
    """Over decoder layers. mean: next to summed prediction terms, twice the layers halve what
    attention counts. sum: its relative weight is the same at any depth."""

    @property
    def kinds_of_pair_weights(self) -> frozenset[str]:
        """How pairs are weighted, by any loss of the term."""
        return frozenset({self.pair_weights})


class CrossAttentionConfig(AttentionConfig):
    """Distillation of cross-attention: of maps, or of what deformable attention samples."""

    # Frozen, so that a wider type does no harm.
    distance: Literal["kl", "mse", "energy", "points"] = "kl"  # type: ignore[assignment]
    """Between two attention maps. kl: Kullback-Leibler divergence of each row. mse: mean squared
    difference. The others are for detectors that sample (``deformable_detr``, ``rt_detr``,
    ``d_fine``, ``deimv2``, ``lw_detr``, ``rf_detr``, ``dino``). energy: the energy distance of
    both sets of weighted points, without a grid; it pulls a point to the teacher's from any
    distance, where maps of points more than a cell apart have nothing in common. points: where the
    decoder began as the teacher's, point by point: divergence of the weights, and L1 of the places
    in cells, weighted by the teacher's; not over adaptive pairs."""
    levels: Literal["stride", "merged"] = "stride"
    """Which feature levels of maps correspond. stride: those of the same stride; others are left
    out, and what is left is renormalised (one level each: the teacher's map is resized). merged:
    all levels are put on the grid of the student's finest, where no stride is shared."""
    blur: Annotated[float, Field(ge=0, le=64)] = 0.0
    """Both maps are smoothed by a Gaussian of this deviation, in cells of their grid, before they
    are compared; 0 does not."""
    queries: Literal["each", "summed"] = "each"
    """each: the maps of each pair are compared. summed: those of all pairs of an image are added up
    (and divided by their number) before they are compared, as TPRD's D3ETR does; with as many
    queries on both sides, who is paired with whom has no effect then."""
    detach_queries: bool = False
    """Only the memory and its keys learn from the term, queries and what makes them do not. Not for
    detectors that sample, whose queries alone say where."""

    @model_validator(mode="after")
    def _sums_are_of_maps(self) -> Self:
        if self.queries == "each":
            return self
        if self.distance in ("energy", "points"):
            raise ValueError(
                f"queries 'summed' adds up maps, and distance '{self.distance}' compares none: set "
                "distance to 'mse' or 'kl'"
            )
        if self.pair_weights != "uniform":
            raise ValueError(
                "queries 'summed' leaves no pairs to weight: set pair_weights to 'uniform'"
            )
        return self

    @model_validator(mode="after")
    def _merged_levels_have_maps(self) -> Self:
        if self.levels == "merged" and self.distance in ("energy", "points"):
            raise ValueError(
                f"levels 'merged' has no effect on distance '{self.distance}', which compares no "
                "maps: remove it"
            )
        return self

    @model_validator(mode="after")
    def _detached_queries_have_a_term(self) -> Self:
        if self.detach_queries and not self.weight:
            raise ValueError("detach_queries has no effect: weight is 0")
        return self

    @model_validator(mode="after")
    def _blur_has_a_map(self) -> Self:
        if self.blur and self.distance == "energy":
            raise ValueError("blur has no effect on distance 'energy', which compares no maps")
        if self.distance == "points" and (self.blur or self.heads == "mean"):
            key = "blur" if self.blur else "heads 'mean'"
            raise ValueError(
                f"{key} does not go with distance 'points', which is by head and point"
            )
        return self


class AuxiliaryGroupConfig(Section):
    """The training-only query group of Fixed Matching."""

    queries: Literal["teacher", "random"] = "teacher"
    """random: frozen random queries, the control that shows what the teacher's are worth."""
    assignment: Literal["teacher", "own"] = "teacher"
    """Whose Hungarian assignment supervises the group with ground truth."""
    ground_truth: bool = True
    """Supervise the group with ground truth at all."""
    always: bool = False
    """Build the group also where nothing is distilled over it."""
    content: Literal["own", "adapted", "learned"] | None = None
    """What the group's decoder states start from, in detectors whose queries have a content.
    adapted: the teacher's, through a linear map where widths differ. own: what the student's own
    queries start from, its encoder's token at the teacher's place, or its learned vectors
    (``rt_detr``, ``d_fine``, ``deimv2`` and ``dino``, whose default it is). learned: the student's
    learned vectors, one after the other (``lw_detr`` and ``rf_detr``, whose default it is)."""


class GeneralPointsConfig(Section):
    """Fresh random queries that both models decode in each step (KD-DETR's general points)."""

    count: Annotated[int, Field(ge=0, le=MAXIMUM)] = 0
    """How many; 0 draws none."""
    weight: Weight = 1.0
    """Of their losses relative to those of the other pairs."""

    @model_validator(mode="after")
    def _weight_has_effect(self) -> Self:
        if self.count and not self.weight:
            raise ValueError("points are drawn but their weight is 0: set count to 0")
        return self


class FeatureConfig(Section):
    """Distillation of memory tokens where the teacher sees objects (DETRDistill's)."""

    weight: Weight = 0.0
    """Of the term in the total loss; 0 switches it off."""
    queries: Annotated[int, Field(ge=1, le=MAXIMUM)] = 100
    """The teacher's best queries, whose likeness to a token says how much it counts."""


class GradientShareConfig(Section):
    """Steering the weight of all terms by distillation's share of the gradient."""

    of_encoder: ClassVar[bool] = False

    target: Annotated[float, Field(gt=0, lt=1)]
    """Wanted share of distillation in the student's |gradient|, beside that of detection losses:
    0.5 counts both alike."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """A share so near to the target leaves the weight."""
    until: Share = 0.9
    """Part of the training in which the weight is steered, once an epoch, or ten times in a run of
    fewer epochs; then it is the recipe's again."""


class EncoderShareConfig(GradientShareConfig):
    """Steering a weight by the encoder's share of the gradient (RT-DETRv4)."""

    of_encoder: ClassVar[bool] = True

    target: Annotated[float, Field(gt=0, lt=1)]
    """Wanted share of |gradient| that lies in the encoder. RT-DETRv4, whose encoder is one layer:
    0.11 (S), 0.035 (M), 0.02 (L, X); other detectors have others, which a run's log shows."""


class MethodConfig(VariantSection):
    """What a student learns from a teacher.

    Each method has a class of its own in the file of its losses (``methods/<name>.py``).
    """

    registry: ClassVar = METHODS
    variant_key: ClassVar = "method"
    default_variant: ClassVar = "none"

    method: str

    @property
    def needs_teacher(self) -> bool:
        """Whether there has to be a teacher."""
        return True

    @property
    def learns_without_labels(self) -> bool:
        """Whether images without ground truth teach anything; those of a method's own, yes."""
        return self.needs_teacher

    @property
    def teacher_kinds(self) -> tuple[str, ...]:
        """Keys of ``teacher``, one of which names what teaches."""
        return ("weights",)

    @property
    def needs_network(self) -> bool:
        """Whether there has to be a teacher's network."""
        return self.needs_teacher and "detections" not in self.teacher_kinds

    def student_problem(self, student: DetectorConfig) -> str | None:
        """Why a student of this architecture cannot learn so from any teacher, or None."""
        return None

    @property
    def matches_adaptively(self) -> bool:
        """Whether the student's queries are matched with the teacher's."""
        return False

    @property
    def inherited_share(self) -> float:
        """Weight of the terms over queries that the student took over from the teacher."""
        return 0.0

    @property
    def description(self) -> str:
        """What is compared, in a few words for people who read a run's page."""
        return ""

    @property
    def warmup(self) -> int:
        """Optimiser steps over which distillation weights grow linearly from 0."""
        return 0

    def distils_at(self, step: int, steps: int) -> bool:
        """Whether optimiser step ``step`` of ``steps`` distils; the others are plain steps.

        A function of both alone, so that workers agree and a resumed run goes on as it would have.
        """
        return self.needs_teacher

    def distilled_steps(self, steps: int) -> int:
        """How many of the run's ``steps`` distil."""
        return steps if self.needs_teacher else 0

    def schedule_problem(self, steps: int, reason: str) -> str | None:
        """Why what is set over steps makes no sense in a run of ``steps``, or None.

        Args:
            steps: optimiser steps of the whole run.
            reason: where their number comes from.
        """
        return warmup_problem("distillation", self.warmup, steps, reason)

    @classmethod
    def complete(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """A section that is given in part is put on top of this method's, not of the section's."""
        defaults = {
            name: field.default.model_dump(mode="json")
            for name, field in cls.model_fields.items()
            if isinstance(field.default, Section) and isinstance(settings.get(name), Mapping)
        }
        return merge(defaults, dict(settings))


class TaughtMethodConfig(MethodConfig):
    """What methods with a teacher share: in which optimiser steps it is used, and how strongly."""

    every_steps: Annotated[int, Field(ge=1, le=MAXIMUM)] = 1
    """Distil in each so-manieth optimiser step, the first one included. The others are steps of
    plain training and cost as much: no pass of the teacher, no auxiliary group, no terms."""
    share_of_training: Share = 1.0
    """Distil during this first part of the run's optimiser steps; what follows is plain
    training."""
    warmup_steps: Annotated[int, Field(ge=0, le=MAXIMUM)] = 0
    """Distillation weights grow linearly from 0 over this many optimiser steps."""
    gradient_share: GradientShareConfig | None = None
    """Steer the weight of all terms by distillation's share of the gradient; None leaves it."""

    @property
    def warmup(self) -> int:
        """Optimiser steps of the warm-up."""
        return self.warmup_steps

    def distils_at(self, step: int, steps: int) -> bool:
        """Each ``every_steps``-th step of the first ``share_of_training``."""
        return step % self.every_steps == 0 and step < self._part(steps)

    def distilled_steps(self, steps: int) -> int:
        """How many of the run's ``steps`` distil."""
        return ceil(self._part(steps) / self.every_steps)

    def _part(self, steps: int) -> int:
        """Steps of the first ``share_of_training``."""
        return ceil(self.share_of_training * steps)

    def schedule_problem(self, steps: int, reason: str) -> str | None:
        """See ``MethodConfig``: only the first ``share_of_training`` counts."""
        part = self._part(steps)
        if part < steps:
            reason = f"{reason}, distillation.share_of_training {self.share_of_training:g} of them"
        if 1 < part <= self.every_steps:
            return (
                f"distillation.every_steps ({self.every_steps}) leaves only the first of {part} "
                f"steps ({reason}) to distil: set it lower, or distillation.method to 'none'"
            )
        return super().schedule_problem(part, reason)


class PredictionMethodConfig(TaughtMethodConfig):
    """What methods share that compare predictions of the teacher's own queries."""

    refine_teacher: bool = False
    """Take from the teacher's earlier layers what they got better (TPRD). A query that is matched
    with an object gets the box and the score of the object's class from the earlier layer of best
    IoU among those that have both more IoU and more score; of any other query in an image with
    objects, the highest score becomes the lowest that an earlier layer has for that class. Earlier
    layers are those of ``layer_map``."""


AnyMethod = Annotated[SerializeAsAny[MethodConfig], BeforeValidator(MethodConfig.coerce)]


def method_config(**settings: Any) -> MethodConfig:
    """The configuration of a method, of the class that ``method`` stands for.

    Raises:
        ValidationError: something is wrong with the settings.
    """
    return MethodConfig.parse(settings)
