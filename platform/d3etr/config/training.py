"""Configuration of optimisation and evaluation."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from d3etr.config.base import MAXIMUM, Section

Precision = Literal["float32", "bfloat16"]

Positive = Annotated[int, Field(ge=1, le=MAXIMUM)]
Weight = Annotated[float, Field(ge=0, le=MAXIMUM)]


class SetCriterionConfig(Section):
    """Loss on ground truth: weights of its terms and of the Hungarian matching cost.

    Of classes: ``class_loss``, or DETR's cross entropy for a detector with
    ``classification: softmax``.
    """

    class_loss: Literal["focal", "varifocal", "mal", "ia_bce"] = "focal"
    """focal: an object's class is 1, as in Conditional DETR. varifocal: it is the IoU of the
    matched box, which also weighs the term (RT-DETR). mal: it is a power of the IoU, and every
    object weighs the same (DEIM). ia_bce: it is a mean of the IoU and of the probability itself
    (LW-DETR, RF-DETR). Not for ``classification: softmax``."""
    class_weight: Weight = 2.0
    """A recipe for a student with ``classification: softmax`` has 1 unless it says otherwise."""
    l1_weight: Weight = 5.0
    """Weight of the L1 distance of boxes in the loss."""
    giou_weight: Weight = 2.0
    """Weight of 1 - GIoU of boxes in the loss."""
    class_cost: Weight = 2.0
    """Likewise. Of the focal cost; of minus the probability where the detector that is matched has
    ``classification: softmax``."""
    l1_cost: Weight = 5.0
    """Weight of the L1 distance of boxes in the matching cost."""
    giou_cost: Weight = 2.0
    """Weight of minus the GIoU of boxes in the matching cost."""
    focal_alpha: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Of the focal cost, and of the loss with ``class_loss: focal``, as ``focal_gamma``; neither
    goes with ``classification: softmax``."""
    focal_gamma: Annotated[float, Field(ge=0, le=MAXIMUM)] = 2.0
    """Exponent of the focal cost and loss: how little easy queries count."""
    quality_alpha: Weight | None = None
    """``class_loss: varifocal``, ``mal`` and ``ia_bce`` only: weight of classes that a query should
    not find; None: 0.75 (varifocal) or 1 (mal), as published. With ``ia_bce``, whose weight of
    those is 1: share of the probability in the mean, at most 1; None: 0.25."""
    quality_gamma: Annotated[float, Field(ge=0, le=MAXIMUM)] | None = None
    """Likewise: exponent of the probability in that weight, and with ``mal`` of the IoU; None: 2
    (varifocal, ia_bce) or 1.5 (mal), as published."""
    fgl_weight: Weight = 0.15
    """Detectors that refine distributions of edges (``d_fine``, ``deimv2``) only, as the next two:
    weight of the fine-grained localisation loss; 0 leaves it out. A recipe for a ``deimv2`` with
    ``encoder: lite`` has 0 for it and ``ddf_weight`` unless it says otherwise."""
    ddf_weight: Weight = 1.5
    """Weight of the loss by which the last layer's distributions teach those of the layers before
    it; 0 leaves it out."""
    union_matching: bool = False
    """Boxes and edges learn, in all layers, over the union of the matches of all layers and of the
    encoder, where a query has the object of most of them. A recipe for a student of ``d_fine`` or
    ``deimv2`` (but ``encoder: lite``) has true unless it says otherwise."""
    no_object_weight: Annotated[float, Field(gt=0, le=MAXIMUM)] = 0.1
    """``classification: softmax`` only: weight of a query that should find nothing in the cross
    entropy; one that should find an object has 1, and the sum is divided by all weights."""

    @property
    def quality_parameters(self) -> tuple[float, float]:
        """``quality_alpha`` and ``quality_gamma``, or what their ``class_loss`` was published with.

        Zhang et al. 2021, arXiv 2008.13367; Huang et al. 2024, arXiv 2412.04234; Chen et al. 2024,
        arXiv 2406.03459.
        """
        published = {"mal": (1.0, 1.5), "ia_bce": (0.25, 2.0)}
        alpha, gamma = published.get(self.class_loss, (0.75, 2.0))
        own = self.quality_alpha, self.quality_gamma
        return (alpha if own[0] is None else own[0]), (gamma if own[1] is None else own[1])

    def idle_quality_key(self) -> str | None:
        """A key of ``varifocal`` and its kin that is set and has no effect, or None."""
        if self.class_loss != "focal":
            return None
        keys = ("quality_alpha", "quality_gamma")
        return next((key for key in keys if getattr(self, key) is not None), None)

    @model_validator(mode="after")
    def _share_of_a_mean(self) -> Self:
        if self.class_loss == "ia_bce" and self.quality_parameters[0] > 1:
            raise ValueError(
                f"quality_alpha is {self.quality_alpha:g}: with class_loss 'ia_bce' it is a share, "
                "at most 1"
            )
        return self

    def idle_edges_key(self) -> str | None:
        """A key that is set and has an effect only where edges are distributions, or None."""
        fields = type(self).model_fields
        keys = ("fgl_weight", "ddf_weight", "union_matching")
        return next((key for key in keys if getattr(self, key) != fields[key].default), None)


class ScheduleConfig(Section):
    """Learning rate over optimiser steps, as a factor on the base rates."""

    kind: Literal["constant", "step", "cosine"] = "step"
    """constant: the base rates. step: a tenth of them after ``drop_at``. cosine: down to
    ``final_factor`` along half a cosine."""
    warmup_steps: Annotated[int, Field(ge=0, le=MAXIMUM)] = 0
    """Linear growth from 0 over this many steps, before any kind."""
    drop_at: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """``step``: share of all steps after which the rate is divided by 10."""
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.01
    """``cosine``: factor reached at the last step."""

    @model_validator(mode="after")
    def _every_setting_counts(self) -> Self:
        for key, kind in (("drop_at", "step"), ("final_factor", "cosine")):
            default = type(self).model_fields[key].default
            if self.kind != kind and getattr(self, key) != default:
                raise ValueError(
                    f"{key} {getattr(self, key):g} has no effect on kind '{self.kind}', only on "
                    f"'{kind}': remove it, or set it to {default:g} where a recipe below has it"
                )
        return self


class OptimisationConfig(Section):
    """AdamW and everything around it."""

    epochs: Positive | None = None
    """Length of the run in passes over the training images; or set ``steps``."""
    steps: Positive | None = None
    """Length of the run: exactly one of epochs and (optimiser) steps."""
    batch_size: Positive = 16
    """Images per optimiser step over all workers and accumulated micro-batches."""
    accumulation: Positive = 1
    """Micro-batches per optimiser step on each worker, while all workers are there."""
    learning_rate: Annotated[float, Field(gt=0, le=MAXIMUM)] = 1e-4
    """AdamW's, of everything but the parts that have a factor of their own."""
    backbone_rate_factor: Annotated[float, Field(ge=0, le=100)] = 0.1
    """The backbone's learning rate, as a factor on ``learning_rate``; 0 freezes the backbone."""
    layer_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Vision transformers (``vit``, timm's) only: factor on the backbone's learning rate for each
    step from its end: the last norm has none, the last block one, the embeddings one more than
    there are blocks. RF-DETR: 0.8. None: all layers have the same rate."""
    sampling_rate_factor: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Detectors that sample only (``deformable_detr``, ``rt_detr``, ``d_fine``, ``deimv2``,
    ``lw_detr``, ``rf_detr``, ``dino``): learning rate of sampling offsets and reference points, as
    a factor on ``learning_rate``; the official code of Deformable DETR has 0.1."""
    inherited_rate_factor: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Learning rate of what ``student.initialise_from`` took, as a factor on its own, during
    ``inherited_warmup_steps``: a new backbone learns to serve a decoder before that moves. 0
    freezes it for so long."""
    inherited_warmup_steps: Annotated[int, Field(ge=0, le=MAXIMUM)] = 0
    """How many optimiser steps that factor acts, from the first on."""
    weight_decay: Weight = 1e-4
    """AdamW's."""
    clip_norm: Annotated[float, Field(gt=0, le=MAXIMUM)] | None = 0.1
    """Gradients are scaled down to this L2 norm where theirs is larger; None does not clip."""
    schedule: ScheduleConfig = ScheduleConfig()
    set_criterion: SetCriterionConfig = SetCriterionConfig()
    precision: Precision = "float32"
    """bfloat16 is autocast; weights and losses stay float32."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Evaluate and keep an exponential moving average of the weights, and of the statistics of
    trained batch norm."""
    compile: bool = False
    """torch.compile the detectors."""
    cuda_graphs: bool = False
    """On one GPU: record what it does in a step, once for each shape of batch, and replay that.
    Batches are padded to multiples of 64 pixels."""

    @property
    def without_effect(self) -> frozenset[str]:
        """Off, ``cuda_graphs`` is no part of a configuration's digest."""
        return frozenset() if self.cuda_graphs else frozenset({"cuda_graphs"})

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(_one_length_text(self.epochs, self.steps))
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of "
                f"accumulation {self.accumulation}"
            )
        warmup = self.schedule.warmup_steps
        if self.steps and (text := warmup_problem("schedule", warmup, self.steps, "steps")):
            raise ValueError(text)
        if (self.inherited_rate_factor != 1) != (self.inherited_warmup_steps > 0):
            raise ValueError(
                "inherited_rate_factor and inherited_warmup_steps have an effect together only: "
                f"they are {self.inherited_rate_factor:g} and {self.inherited_warmup_steps}"
            )
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the whole run."""
        return self.steps or (self.epochs or 0) * steps_per_epoch


def warmup_problem(section: str, warmup: int, steps: int, reason: str) -> str | None:
    """Why a warm-up makes no sense, or None.

    Args:
        section: whose ``warmup_steps`` it is.
        warmup: its length, steps.
        steps: of the whole run.
        reason: where the number of steps comes from.
    """
    if warmup <= steps:
        return None
    return (
        f"{section}.warmup_steps ({warmup}) is above the run's {steps} steps ({reason}): full "
        "strength would never be reached; set it to a fraction of them, or train longer"
    )


class EvaluationConfig(Section):
    """When and how the student is measured (COCO mAP)."""

    every_epochs: Positive = 1
    """Measure on the validation split after every so many epochs, and after the last."""
    every_steps: Positive | None = None
    """Measure also within epochs, every so many optimiser steps; None does not."""
    batch_size: Positive = 16
    """Images per forward pass and worker."""
    maximum_detections: Positive = 100
    """Detections per image, as COCO counts them."""
    test: bool = False
    """After training, measure the kept weights once on the test split."""
    keep: Literal["best", "last"] = "best"
    """Which weights the run hands over: best validation mAP, or the last."""

    @property
    def without_effect(self) -> frozenset[str]:
        """Unset, ``every_steps`` is no part of a configuration's digest."""
        return frozenset() if self.every_steps else frozenset({"every_steps"})

    def times(self, first: int, steps: int, steps_per_epoch: int) -> int:
        """How many measurements on the validation split a run makes, the last one included.

        Args:
            first: optimiser steps that are done.
            steps: of the whole run.
            steps_per_epoch: optimiser steps.
        """
        every = self.every_epochs * steps_per_epoch
        at = {steps, *range(every, steps, every)}
        if self.every_steps is not None:
            at |= {*range(self.every_steps, steps, self.every_steps)}
        return sum(step > first for step in at)


class PretrainingConfig(Section):
    """Training of a backbone as a classifier of objects, before it ever detects one."""

    crop_size: Annotated[int, Field(ge=16, le=512)] = 32
    """Pixels of the square crops that the backbone classifies."""
    context: Annotated[float, Field(ge=0, le=4)] = 0.1
    """A crop's side is the object's longer side times 1 + context."""
    steps: Positive = 1500
    """Length of the training."""
    batch_size: Positive = 32
    """Crops per optimiser step."""
    learning_rate: Annotated[float, Field(gt=0, le=MAXIMUM)] = 3e-3
    """Highest learning rate of AdamW; it warms up and falls along a cosine."""
    weight_decay: Weight = 1e-3
    """AdamW's, of all matrices and kernels."""
    backgrounds: Annotated[float, Field(ge=0, le=10)] = 0.2
    """Crops without an object, for each crop with one."""
    maximum_crops: Annotated[int, Field(ge=1, le=MAXIMUM)] = 40_000
    """Crops kept in memory; more objects than that are sampled."""


def _one_length_text(epochs: int | None, steps: int | None) -> str:
    what = "needs exactly one of epochs and steps"
    if epochs is None:
        return f"{what}, for example --set optimisation.epochs=50"
    return (
        f"{what}, but epochs is {epochs} and steps is {steps}: set the other one to null as well, "
        "--set optimisation.epochs=null or --set optimisation.steps=null"
    )
