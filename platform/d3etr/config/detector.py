"""Configuration of detectors, and of the roles teacher and student."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from d3etr.config.backbone import BackboneConfig
from d3etr.config.base import MAXIMUM, Layers, Section, Size
from d3etr.config.location import Location
from d3etr.config.training import Precision, PretrainingConfig
from d3etr.config.variants import VariantSection
from d3etr.config.views import ViewsConfig
from d3etr.registry import DETECTORS
from d3etr.text import bare_url


class DetectorConfig(VariantSection):
    """Architecture of one detector: what all kinds have. The classes come from the data.

    Each kind adds its own keys in a class in its detector's file (``detectors/<name>.py``).
    """

    registry: ClassVar = DETECTORS
    variant_key: ClassVar = "name"
    default_variant: ClassVar = "conditional_detr"
    wrote_all_keys: ClassVar = True

    name: str
    backbone: BackboneConfig = BackboneConfig()
    width: Size = 256
    """Model width D, the channels of encoder and decoder."""
    heads: Size = 8
    """Attention heads; ``width`` must be a multiple of twice their number."""
    encoder_layers: Annotated[int, Field(ge=0, le=100)] = 6
    """Layers of the transformer's encoder; 0 leaves it out."""
    decoder_layers: Layers = 6
    """L, layers of the transformer's decoder."""
    feedforward: Size = 2048
    """Channels between the two linear maps of each layer."""
    queries: Size = 300
    """N, object queries: the most objects that can be found in an image."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of activations that training sets to 0."""
    box_size_bias: Annotated[float, Field(ge=-100, le=100)] = 0.0
    """Initial bias of the width and height logits of boxes (DAB-DETR: of its anchors);
    negative starts small. Not where an encoder proposes the boxes (two stages, ``rt_detr``,
    ``d_fine``, ``deimv2``, ``lw_detr``, ``rf_detr``, ``dino``)."""

    @property
    def feature_levels(self) -> int:
        """Feature levels that cross-attention maps run over."""
        return 1

    @property
    def cross_attention_heads(self) -> int:
        """Heads of the decoder's attention to the memory."""
        return self.heads

    @property
    def reference_size(self) -> int:
        """Numbers of a query's reference that the decoder takes: a point's 2, a box's 4, or 0."""
        return 0

    @property
    def softmax_classes(self) -> bool:
        """Whether classes and "no object" share one softmax."""
        return False

    @property
    def criterion_defaults(self) -> Mapping[str, float | str]:
        """Defaults of ``optimisation.set_criterion`` that differ for a student of this kind."""
        return {}

    @property
    def sampling_parts(self) -> frozenset[str]:
        """Names of modules that ``optimisation.sampling_rate_factor`` is about."""
        return frozenset()

    @property
    def queries_need_images(self) -> bool:
        """Whether each image has queries of its own, which the encoder selects."""
        return False

    @property
    def proposals_tell_classes(self) -> bool:
        """Whether what the encoder proposes learns objects' classes, or only that they are some."""
        return False

    @property
    def edge_bins(self) -> Mapping[str, float]:
        """Of distributions that boxes are refined as, keys that say which distances bins stand for.

        They are the ``bins``, ``bound`` and ``curvature`` of D-FINE; none where boxes are numbers.
        """
        return {}

    @property
    def refines_distributions(self) -> bool:
        """Whether boxes are refined as distributions, of queries that its encoder proposes."""
        return bool(self.edge_bins)

    @property
    def takes_embedding(self) -> bool:
        """Whether the decoder uses a query's embedding that somebody else made."""
        return True

    @property
    def takes_content(self) -> bool:
        """Whether the decoder's states start from a query's content."""
        return False

    @property
    def learns_content(self) -> bool:
        """Whether that is a vector of the query's own, learned and shared by all images."""
        return False

    @property
    def auxiliary_content(self) -> Literal["own", "adapted", "learned"]:
        """What ``auxiliary_group.content`` is unless a recipe says."""
        return "adapted"

    @property
    def derives_references(self) -> bool:
        """Whether the detector makes references from embeddings where a group has none."""
        return False

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} must be a multiple of 2 * heads ({2 * self.heads})"
            )
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 (position encoding)")
        return self


AnyDetector = Annotated[SerializeAsAny[DetectorConfig], BeforeValidator(DetectorConfig.coerce)]


def detector_config(**settings: Any) -> DetectorConfig:
    """The architecture of a detector, of the class that ``name`` stands for.

    Raises:
        ValidationError: something is wrong with the settings.
    """
    return DetectorConfig.parse(settings)


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
    layers: Literal["first", "uniform"] | tuple[Annotated[int, Field(ge=0, le=MAXIMUM)], ...] = (
        "first"
    )
    """Which of its decoder layers, counted from 0, each of the student's starts from. first: the
    one of the same number. uniform: as ``distillation.layer_map``, the last for the last. A list
    names one for each, such as [1, 3, 5]. What only the first layer has is the first's."""
    widths: Literal["refuse", "principal"] = "refuse"
    """Of a wider detector. refuse: nothing fits. principal: decoder, heads and queries along the
    principal directions of its decoder (``detr``, ``conditional_detr``, ``dab_detr``, and
    ``deformable_detr`` of one stage)."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if len({*self.parts}) < len(self.parts):
            raise ValueError("parts names one twice")
        if self.layers != "first" and "decoder" not in self.parts:
            raise ValueError("layers has no effect without 'decoder' among the parts")
        if self.widths != "refuse" and {"decoder", "heads", "queries"}.isdisjoint(self.parts):
            raise ValueError("widths has no effect without 'decoder', 'heads' or 'queries'")
        return self


class StudentConfig(Section):
    """The detector that is trained: a student, or a teacher-to-be with method ``none``."""

    detector: AnyDetector = Field(default_factory=detector_config)
    backbone_weights: Annotated[
        Literal["imagenet"] | Location | None, Field(union_mode="left_to_right")
    ] = None
    """Where the backbone starts: ImageNet weights of torchvision (of timm for its own networks and
    ResNet-vd), a file (or its URL) that ``d3etr pretrain-backbone`` or ``d3etr import-weights``
    wrote, or None for random numbers."""
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


def _as_tuple(value: object) -> object:
    """One place is a list of one."""
    if isinstance(value, list):
        return tuple(value)
    return value if value is None or isinstance(value, tuple) else (value,)


def _folder_on_this_machine(value: object) -> object:
    """A folder's path as text."""
    if isinstance(value, str) and "://" in value:
        raise ValueError(
            f"found '{bare_url(value)}', expected a folder on this machine: download the model's "
            "files into one first"
        )
    return str(value) if isinstance(value, Path) else value


class TeacherConfig(Section):
    """The frozen detector that teaches, what one has found, or a foundation model."""

    weights: Location | None = None
    """A d3etr weights file, or its URL; its architecture is read from the file. Every method needs
    it but those that learn from ``detections`` or ``features``."""
    detections: Annotated[
        Annotated[tuple[Location, ...], Field(min_length=1)] | None, BeforeValidator(_as_tuple)
    ] = None
    """COCO results files (or their URLs) with what detectors of any kind have found on the training
    images; for method teach_detr, in place of ``weights``."""
    features: Annotated[
        Path | None, Field(strict=False), BeforeValidator(_folder_on_this_machine)
    ] = None
    """A Hugging Face folder of a DINOv2 or DINOv3 ViT (config.json, model.safetensors,
    preprocessor_config.json), whose patch features the student's encoder imitates; for method
    feature_cosine, in place of ``weights``. Needs the extra ``d3etr[transformers]``."""
    minimum_mAP: Annotated[float, Field(ge=0, le=1)] = 0.0
    """A teacher below this on the validation split stops the run before it starts."""
    evaluation: Literal["verify", "measure"] = "verify"
    """verify: accept the evaluation recorded in the weights file if it was on the same data,
    else measure. measure: always evaluate."""
    precision: Precision | None = None
    """Of the teacher's forward passes in training; None: the student's, optimisation.precision."""
    image_scale: Annotated[float, Field(ge=0.25, le=4)] = 1.0
    """How large the teacher sees the same augmented picture, as a factor on the student's sides:
    data.preprocessing's and those of ``shortest_sides`` times this, from the decoded original."""
    views: ViewsConfig | None = None
    """Store the teacher's outputs for a few augmentations of each image before training, which then
    runs no teacher; None runs it in every step."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = {
            "weights": self.weights is not None,
            "detections": self.detections is not None,
            "features": self.features is not None,
        }
        if sum(kinds.values()) != 1:
            raise ValueError("expected exactly one of weights, detections and features")
        fields = type(self).model_fields
        others = sorted(self.model_fields_set - {*kinds})
        changed = [key for key in others if getattr(self, key) != fields[key].default]
        if self.features is not None:
            changed = [key for key in changed if key not in ("precision", "image_scale")]
        if self.weights is None and changed:
            what = "boxes in files" if self.detections else "a foundation model"
            raise ValueError(f"{', '.join(changed)} have no effect on {what}: remove them")
        return self
