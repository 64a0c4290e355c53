"""Configuration of detectors, and of the roles teacher and student."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from d3etr.config.backbones import SMALL, WITHOUT_BATCH_NORM, family_of, known_backbone
from d3etr.config.base import MAXIMUM, Section
from d3etr.config.location import Location
from d3etr.config.training import Precision, PretrainingConfig

Positive = Annotated[int, Field(ge=1, le=65_536)]
Layers = Annotated[int, Field(ge=1, le=100)]


class BackboneConfig(Section):
    """The network below the encoder."""

    name: Annotated[str, AfterValidator(known_backbone)] = "resnet50"
    """A torchvision network that gives feature maps (ResNets, ConvNeXt, Swin, EfficientNet and
    more, by torchvision's names), or ``small``: a GroupNorm network for small images."""
    dilation: bool = False
    """DC5: the last stage keeps stride 16 and dilates instead (ResNets only)."""
    norm: Literal["frozen", "group"] = "frozen"
    """What takes the place of batch norm: frozen statistics (needs weights), or GroupNorm.
    ``small`` is GroupNorm; ConvNeXt and Swin have LayerNorm, which stays."""
    stem_width: Positive = 16
    """``small`` only: channels of the stem (stride 2 at the first stage)."""
    stage_widths: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=8)] = (24, 48, 64)
    """``small`` only: channels per stage; each stage halves the resolution."""
    stage_blocks: Layers = 1
    """``small`` only: residual blocks per stage."""
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 0
    """Torchvision's networks: how many of stem and four stages, from the stem on, keep their
    weights; DETR uses 2 (stem and first stage) with ImageNet weights."""
    trainable: bool = True
    """False freezes the whole backbone."""

    @property
    def has_batch_norm(self) -> bool:
        """Whether torchvision's network has what ``norm`` is about."""
        return self.name != SMALL and family_of(self.name) not in WITHOUT_BATCH_NORM

    @property
    def keeps_statistics(self) -> bool:
        """Whether it is of no use without weights: it keeps the batch statistics in them."""
        return self.has_batch_norm and self.norm == "frozen"

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        if self.name == SMALL and self.dilation:
            raise ValueError("dilation (DC5) is for ResNets; backbone 'small' has stride 8 already")
        if self.dilation and family_of(self.name) != "ResNet":
            raise ValueError(f"dilation (DC5) is for ResNets, not for backbone '{self.name}'")
        if self.name == SMALL and self.frozen_stages:
            raise ValueError("frozen_stages is for torchvision's networks, not backbone 'small'")
        if self.name == SMALL and any(w % 8 for w in (self.stem_width, *self.stage_widths)):
            raise ValueError("stem_width and stage_widths must be multiples of 8 (GroupNorm)")
        if self.norm != "frozen" and self.name != SMALL and not self.has_batch_norm:
            raise ValueError(
                f"norm has no effect on backbone '{self.name}': it has no batch norm to replace"
            )
        return self


class DetectorConfig(Section):
    """Architecture of one detector. The number of classes comes from the data."""

    name: Literal["detr", "conditional_detr", "dab_detr", "deformable_detr"] = "conditional_detr"
    backbone: BackboneConfig = BackboneConfig()
    width: Positive = 256
    """Model width D, the channels of encoder and decoder."""
    heads: Positive = 8
    encoder_layers: Annotated[int, Field(ge=0, le=100)] = 6
    decoder_layers: Layers = 6
    feedforward: Positive = 2048
    queries: Positive = 300
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    box_size_bias: Annotated[float, Field(ge=-100, le=100)] = 0.0
    """Initial bias of the width and height logits of boxes (DAB-DETR: of its anchors);
    negative starts small."""
    first_looks: Literal["anywhere", "reference"] = "anywhere"
    """``conditional_detr`` only: where untrained cross-attention looks. anywhere: random
    projections, the official code's. reference: around each query's reference point (our choice),
    which spares small data sets the steps that it takes to find out."""
    classification: Literal["sigmoid", "softmax"] = "sigmoid"
    """softmax: over classes and "no object", the official DETR's; ``detr`` only."""
    unused_outputs: Annotated[int, Field(ge=0, le=65_536)] = 0
    """With softmax only: outputs that take part in it and are no class; imported weights have
    them where ids of COCO's list belong to no category."""
    grid_temperature: Annotated[float, Field(gt=0, le=MAXIMUM)] = 20.0
    """``dab_detr`` only: longest period of the position encoding of grid cells; one of the
    official detectors has 10."""
    inverse_sigmoid_epsilon: Annotated[float, Field(gt=0, lt=0.5)] = 1e-5
    """``dab_detr`` only: a side or centre of an anchor this close to 0 or 1 moves from there; the
    official code's is 1e-3, Hugging Face's 1e-5."""
    levels: Annotated[int, Field(ge=1, le=16)] = 4
    """``deformable_detr`` only: feature levels; up to three are the backbone's last stages,
    each further one halves the resolution again."""
    points: Positive = 4
    """``deformable_detr`` only: places that each head samples on each level."""
    box_refinement: bool = False
    """``deformable_detr`` only: every decoder layer moves the boxes of the one before."""
    two_stage: bool = False
    """``deformable_detr`` only: the encoder proposes the boxes that queries start from;
    needs box_refinement."""

    @property
    def feature_levels(self) -> int:
        """Feature levels that cross-attention maps run over."""
        return self.levels if self.name == "deformable_detr" else 1

    @property
    def reference_size(self) -> int:
        """Numbers of a query's reference that the decoder takes: a point's 2, a box's 4, or 0."""
        sizes = {"detr": 0, "conditional_detr": 2, "dab_detr": 4, "deformable_detr": 2}
        return 4 if self.two_stage else sizes[self.name]

    @model_validator(mode="after")
    def _settings_belong_to_the_detector(self) -> Self:
        multi_scale = ("levels", "points", "box_refinement", "two_stage")
        owners = {
            "classification": "detr",
            "unused_outputs": "detr",
            "grid_temperature": "dab_detr",
            "inverse_sigmoid_epsilon": "dab_detr",
            "first_looks": "conditional_detr",
            **dict.fromkeys(multi_scale, "deformable_detr"),
        }
        fields = type(self).model_fields
        for key, owner in owners.items():
            if self.name != owner and getattr(self, key) != fields[key].default:
                raise ValueError(
                    f"{key} has no effect on detector '{self.name}', only on '{owner}'"
                )
        if self.unused_outputs and self.classification != "softmax":
            raise ValueError("unused_outputs has no effect without classification 'softmax'")
        if self.two_stage and not self.box_refinement:
            raise ValueError("two_stage needs box_refinement: set it to true, as in the paper")
        if self.name == "deformable_detr" and self.width % 32:
            raise ValueError(
                f"width {self.width} must be a multiple of 32 for detector 'deformable_detr' "
                "(GroupNorm of its feature levels)"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} must be a multiple of 2 * heads ({2 * self.heads})"
            )
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 (position encoding)")
        return self


DetectorPart = Literal["backbone", "encoder", "decoder", "heads", "queries"]


class InitialiseFromConfig(Section):
    """Another detector whose parts a student starts from."""

    weights: Location | None = None
    """A d3etr weights file or its URL; None: the teacher's, ``teacher.weights``."""
    parts: Annotated[tuple[DetectorPart, ...], Field(min_length=1)] = (
        "decoder",
        "heads",
        "queries",
    )
    """Which: ``backbone``, ``encoder`` (with the projection of features), ``decoder``, ``heads``,
    ``queries`` (with what places them). Tensors of the same name and shape are taken."""

    @model_validator(mode="after")
    def _each_part_once(self) -> Self:
        if len({*self.parts}) < len(self.parts):
            raise ValueError("parts names one twice")
        return self


class StudentConfig(Section):
    """The detector that is trained: a student, or a teacher-to-be with method ``none``."""

    detector: DetectorConfig = DetectorConfig()
    backbone_weights: Annotated[
        Literal["imagenet"] | Location | None, Field(union_mode="left_to_right")
    ] = None
    """Where the backbone starts: torchvision's ImageNet weights, a file (or its URL) that
    ``d3etr pretrain-backbone`` or ``d3etr import-weights`` wrote, or None for random numbers."""
    initialise_from: InitialiseFromConfig | None = None
    """Parts of another detector that this one starts from."""
    pretraining: PretrainingConfig = PretrainingConfig()
    """How ``d3etr pretrain-backbone`` makes that file; training does not look at it."""

    @model_validator(mode="after")
    def _one_start_of_the_backbone(self) -> Self:
        start = self.initialise_from
        if start is not None and "backbone" in start.parts and self.backbone_weights is not None:
            raise ValueError(
                "backbone_weights and initialise_from both start the backbone: set "
                "backbone_weights to null, or take 'backbone' out of initialise_from.parts"
            )
        return self


class TeacherConfig(Section):
    """The frozen detector that teaches."""

    weights: Location
    """A d3etr weights file, or its URL; its architecture is read from the file."""
    minimum_mAP: Annotated[float, Field(ge=0, le=1)] = 0.0
    """A teacher below this on the validation split stops the run before it starts."""
    evaluation: Literal["verify", "measure"] = "verify"
    """verify: accept the evaluation recorded in the weights file if it was on the same data,
    else measure. measure: always evaluate."""
    precision: Precision | None = None
    """Of the teacher's forward passes in training; None: the student's, optimisation.precision."""
    cache_gigabytes: Annotated[float, Field(gt=0, le=MAXIMUM)] | None = None
    """Keep what the teacher says about a training image in a file on each machine, of at most so
    many gigabytes, and read it where a run or trial shows the teacher the same pixels again.
    None keeps nothing."""
