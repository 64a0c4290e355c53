"""CLoCKDistill (arXiv 2502.10683): memory under object masks, and objects as shared queries.

The paper's, as a third-party port quotes it: the encoders' memories are compared inside and outside
objects with weights of 5e-5 and 1e-7 (``losses/object_masks.py``); queries made of ground truth run
through both decoders (``TargetQueries``), where query i corresponds to query i, and every layer's
KL divergence of classes, L1 and GIoU of boxes count 1, 5 and 2, each query as much as the teacher
is sure of it. Our choices: a linear map between the widths of memories; the sum over queries is
divided by the teacher's total confidence in them; these queries learn nothing from ground truth.

Shapes: L decoder layers · B images · K queries made of objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import (
    LayerList,
    MethodConfig,
    PredictionConfig,
    TaughtMethodConfig,
    Weight,
)
from d3etr.errors import UserError
from d3etr.losses.features import resize_tokens
from d3etr.losses.object_masks import object_shares, weighted_distance
from d3etr.losses.prediction import prediction_losses
from d3etr.methods.adapters import TargetQueries, TeacherQueries
from d3etr.methods.base import Matches, Method, StudentOutputs, TeacherOutputs
from d3etr.methods.selection import teacher_layers
from d3etr.structures import DecoderOutputs, ObjectQueries, QueryGroup, Supervision, Targets

TARGETS = "targets"
"""Name of the group of queries made of objects."""
_TINY = torch.finfo(torch.float32).tiny


class CLoCKDistillConfig(TaughtMethodConfig):
    """CLoCKDistill: weights of memory and of queries made of objects."""

    method: Literal["clockdistill"] = "clockdistill"
    foreground_weight: Weight = 5e-5
    """Of squared differences of memory inside objects: summed over channels, the mean over an
    object's tokens, summed over objects."""
    background_weight: Weight = 1e-7
    """Of those outside objects: summed over channels, the mean over these tokens."""
    target_weight: Weight = 1.0
    """Of all terms over queries made of objects; 0 makes none, and the teacher's decoder does not
    run."""
    target_queries: Annotated[int, Field(ge=1, le=1000)] = 100
    """K, such queries in each image; an image's objects beyond are left out."""
    class_loss: Literal["kl", "bce", "focal"] = "kl"
    """Over such queries; as ``prediction.class_loss`` of method d3etr."""
    class_weight: Weight = 1.0
    """Of the class loss."""
    l1_weight: Weight = 5.0
    """Weight of the L1 distance of boxes."""
    giou_weight: Weight = 2.0
    """Weight of 1 - GIoU of boxes."""
    layer_map: Literal["uniform", "last"] | LayerList = "uniform"
    """Teacher layer for each student layer; a list names them, last must map to last."""

    @property
    def compares_memory(self) -> bool:
        """Whether memories are compared."""
        return bool(self.foreground_weight or self.background_weight)

    @property
    def learns_without_labels(self) -> bool:
        """Masks and queries are made of objects."""
        return False

    @property
    def description(self) -> str:
        """Both terms with their weights."""
        memory = f"memory ({self.foreground_weight:g} in objects, {self.background_weight:g} else)"
        return f"{memory}, queries made of objects ({self.target_weight:g})"

    @property
    def without_effect(self) -> frozenset[str]:
        """Keys of the queries that are not made."""
        if self.target_weight:
            return frozenset()
        keys = ("target_queries", "class_loss", "class_weight", "l1_weight", "giou_weight")
        return frozenset({*keys, "layer_map"})

    @model_validator(mode="after")
    def _every_setting_fires(self) -> Self:
        if not (self.compares_memory or self.target_weight):
            raise ValueError(
                "foreground_weight, background_weight and target_weight are all 0: use method "
                "'none'"
            )
        if not (self.class_weight or self.l1_weight or self.giou_weight):
            raise ValueError(
                "class_weight, l1_weight and giou_weight are all 0: set target_weight to 0"
            )
        if idle := sorted(self.without_effect & self.model_fields_set):
            raise ValueError(f"target_weight 0 makes no queries of objects: remove {idle[0]}")
        return self


class CLoCKDistill(Method):
    """L = L_det(main) + L_memory + w L_targets.

    L_memory = sum_s (alpha S_s + beta S'_s) |A t_s + a - t'_s|^2 over tokens s, with the shares S
    inside and S' outside objects (``object_shares``); A is a linear map that only training has.
    L_targets is class KL + 5 L1 + 2 (1 - GIoU) over queries made of objects.
    """

    config_class = CLoCKDistillConfig
    needs_teacher_outputs = True
    needs_own_queries = False

    def __init__(
        self,
        config: CLoCKDistillConfig,
        student: DetectorConfig,
        teacher: DetectorConfig,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.needs_features = config.compares_memory
        makes = bool(config.target_weight)
        self.needs_decoder = self.makes_queries_of_objects = self.groups_need_images = makes
        if config.compares_memory:
            same = student.width == teacher.width
            self.adapter = nn.Identity() if same else nn.Linear(student.width, teacher.width)
        if makes:
            depths = student.decoder_layers, teacher.decoder_layers
            self.layers = teacher_layers(config.layer_map, *depths)
            self.queries = TargetQueries(teacher.width, config.target_queries, seed)
            self.taken_over = TeacherQueries(teacher, student)
        self._prediction = PredictionConfig(
            class_loss=config.class_loss,
            class_weight=config.class_weight,
            l1_weight=config.l1_weight,
            giou_weight=config.giou_weight,
        )

    @classmethod
    def check_compatible(
        cls, config: MethodConfig, student: DetectorConfig, teacher: DetectorConfig, classes: int
    ) -> None:
        """Refuse queries of objects where queries have no place, and a loss that is always 0."""
        assert isinstance(config, CLoCKDistillConfig)
        if not config.target_weight:
            return
        teacher_layers(config.layer_map, student.decoder_layers, teacher.decoder_layers)
        lost = [
            f"the {whose} ({detector.name})"
            for whose, detector in {"student": student, "teacher": teacher}.items()
            if not detector.reference_size
        ]
        if lost:
            raise UserError(
                "distillation.target_weight makes queries at objects, but queries of "
                f"{' and '.join(lost)} have no place: set it to 0, or use 'conditional_detr', "
                "'dab_detr' or 'deformable_detr'"
            )
        if classes == 1 and config.class_loss == "kl" and config.class_weight:
            raise UserError(
                "distillation.class_loss 'kl' compares a softmax over the classes, and the data "
                "has one class: the loss would always be 0. Set it to 'bce' or 'focal'"
            )

    def teacher_groups(
        self, queries: ObjectQueries, targets: Targets | None, step: int
    ) -> dict[str, ObjectQueries]:
        """Queries made of objects, in place of the teacher's own."""
        if targets is None:
            raise ValueError("queries are made of ground truth, which is not given")
        return {TARGETS: self.queries(targets, queries)}

    def student_groups(
        self, teacher: TeacherOutputs, targets: Targets, step: int
    ) -> dict[str, QueryGroup]:
        """The same queries, of the student's width."""
        if TARGETS not in teacher.groups:
            return {}
        queries = self.taken_over(teacher.groups[TARGETS].queries)
        return {TARGETS: QueryGroup(queries, Supervision.NONE)}

    def normalisers(self, teacher: TeacherOutputs, targets: Targets) -> dict[str, Tensor]:
        """[L] confidence of the teacher in queries made of objects."""
        if TARGETS not in teacher.groups:
            return {}
        return {TARGETS: self._confidence(teacher.groups[TARGETS].outputs, targets).sum((1, 2))}

    def _confidence(self, outputs: DecoderOutputs, targets: Targets) -> Tensor:
        """[L, B, K] float32, 0 for queries that are not made of an object."""
        return outputs.confidence().float() * self.queries.used(targets)

    def losses(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        matches: Matches,
        targets: Targets,
        normalisers: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """L_memory + w L_targets."""
        terms: dict[str, Tensor] = {}
        if self.config.compares_memory:
            terms |= self._memory(student, teacher, targets, normalisers["labelled_images"])
        if TARGETS in teacher.groups:
            ours, theirs = student.groups[TARGETS], teacher.groups[TARGETS].outputs
            terms |= self._targets(ours, theirs, targets, normalisers[TARGETS])
        return terms

    def _memory(
        self, student: StudentOutputs, teacher: TeacherOutputs, targets: Targets, images: Tensor
    ) -> dict[str, Tensor]:
        """The mean over images with labels, inside and outside objects."""
        known, targets = targets.labelled, targets.of_labelled()
        ours, theirs = student.memory, teacher.memory
        assert theirs is not None
        tokens = theirs.tokens.float()
        target = resize_tokens(tokens, theirs.padding, theirs.levels, ours.levels)[:known]
        padding = None if ours.padding is None else ours.padding[:known]
        shares = object_shares(targets, padding, ours.levels)
        mapped = self.adapter(ours.tokens[:known].float())
        weights = {
            "foreground": (self.config.foreground_weight, shares[0]),
            "background": (self.config.background_weight, shares[1]),
        }
        return {
            f"memory/{name}": weight * weighted_distance(mapped, target, share) / images
            for name, (weight, share) in weights.items()
            if weight
        }

    def _targets(
        self, ours: DecoderOutputs, theirs: DecoderOutputs, targets: Targets, total: Tensor
    ) -> dict[str, Tensor]:
        """Over queries made of objects, each as much as the teacher is sure of it."""
        weights = self._confidence(theirs, targets) / total.clamp(min=_TINY)[:, None, None]
        found = prediction_losses(
            ours.logits.float(),
            ours.boxes_cxcywh.float(),
            theirs.logits.float(),
            theirs.boxes_cxcywh.float(),
            weights,
            weights,
            self._prediction,
        )
        return {f"{TARGETS}/{name}": self.config.target_weight * x for name, x in found.items()}
