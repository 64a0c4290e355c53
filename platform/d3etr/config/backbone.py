"""Configuration of backbones."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from d3etr.config.backbones import (
    DINOV3,
    RESNET_VD,
    SMALL,
    VIT,
    WITHOUT_BATCH_NORM,
    family_of,
    is_timm_vit,
    known_backbone,
)
from d3etr.config.base import Layers, Section, Size
from d3etr.config.dinov3 import DINOv3Config
from d3etr.config.vit import Outputs, ViTConfig, rising

STAGES = 5
"""Stem and stages of a network, at most."""


class BackboneConfig(Section):
    """The network below the encoder."""

    name: Annotated[str, AfterValidator(known_backbone)] = "resnet50"
    """A torchvision network that gives feature maps (ResNets, ConvNeXt, Swin, EfficientNet and
    more, by torchvision's names), ``resnet50vd`` (18, 34, 50, 101: RT-DETR's ResNets),
    ``timm/NAME`` of one of timm's (and ``timm/hgnetv2_atto``, ``_femto``, ``_pico``: DEIMv2's),
    ``vit``: the vision transformers of LW-DETR and RF-DETR, ``dinov3``: DEIMv2's, or ``small``: a
    GroupNorm network for small images."""
    dilation: bool = False
    """DC5: the last stage keeps stride 16 and dilates instead (torchvision's ResNets only)."""
    norm: Literal["frozen", "group", "batch"] = "frozen"
    """What takes the place of batch norm: frozen statistics (needs weights), GroupNorm, or batch
    norm that is trained. The last takes its statistics over one micro-batch of every worker, so
    that ``optimisation.accumulation`` leaves fewer images to each; frozen parts keep theirs.
    ``small`` is GroupNorm; ConvNeXt, Swin and vision transformers have LayerNorm, which stays."""
    stem_width: Size = 16
    """``small`` only: channels of the stem (stride 2 at the first stage)."""
    stage_widths: Annotated[tuple[Size, ...], Field(min_length=1, max_length=8)] = (24, 48, 64)
    """``small`` only: channels per stage; each stage halves the resolution."""
    stage_blocks: Layers = 1
    """``small`` only: residual blocks per stage."""
    frozen_stages: Annotated[int, Field(ge=0, le=100)] = 0
    """All but ``small``, ``vit`` and ``dinov3``: how many of stem and four stages, from the stem
    on, keep their weights; DETR uses 2 (stem and first stage) with ImageNet weights. Timm's vision
    transformers: how many of embeddings and blocks."""
    trainable: bool = True
    """False freezes the whole backbone."""
    vit: ViTConfig = ViTConfig()
    dinov3: DINOv3Config = DINOv3Config()
    outputs: Outputs | None = None
    """Timm's vision transformers only: after how many blocks features are taken, rising; blocks
    after the last one are left out. ``lw_detr`` and ``rf_detr`` read all of them, other detectors
    the last. None: after each quarter of the blocks, as RF-DETR does."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """``vit`` and timm's vision transformers only: how often training leaves out a branch of the
    last block; earlier blocks' less often, the first one's never. LW-DETR large: 0.1."""

    @property
    def has_blocks(self) -> bool:
        """Whether the network is a plain row of blocks of one resolution: a vision transformer."""
        return self.name == VIT or is_timm_vit(self.name)

    @property
    def has_batch_norm(self) -> bool:
        """Whether the network has what ``norm`` is about."""
        return self.name != SMALL and family_of(self.name) not in WITHOUT_BATCH_NORM

    @property
    def keeps_statistics(self) -> bool:
        """Whether it is of no use without weights: it keeps the batch statistics in them."""
        return self.has_batch_norm and self.norm == "frozen"

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        if self.name == SMALL and self.dilation:
            raise ValueError("dilation (DC5) is for ResNets; backbone 'small' has stride 8 already")
        if self.dilation and self.name in RESNET_VD:
            raise ValueError(
                f"dilation (DC5) is for torchvision's ResNets, such as {self.name[:-2]}: the "
                f"shortcuts of '{self.name}' pool where they halve a map"
            )
        if self.dilation and family_of(self.name) != "ResNet":
            raise ValueError(f"dilation (DC5) is for ResNets, not for backbone '{self.name}'")
        if self.name == SMALL and self.frozen_stages:
            raise ValueError(
                "frozen_stages is for networks of torchvision and timm, not backbone 'small'"
            )
        if self.name == SMALL and any(w % 8 for w in (self.stem_width, *self.stage_widths)):
            raise ValueError("stem_width and stage_widths must be multiples of 8 (GroupNorm)")
        if self.name in (VIT, DINOV3) and self.frozen_stages:
            raise ValueError(
                f"frozen_stages is for networks of stages, not for '{self.name}': set trainable "
                "to false"
            )
        if self.name != VIT and self.vit != ViTConfig():
            raise ValueError(f"vit has no effect on backbone '{self.name}', only on '{VIT}'")
        if self.name != DINOV3 and self.dinov3 != DINOv3Config():
            raise ValueError(f"dinov3 has no effect on backbone '{self.name}', only on '{DINOV3}'")
        if self.norm == "batch" and self.name == SMALL:
            raise ValueError("norm 'batch' has no effect on backbone 'small': it is GroupNorm")
        if self.norm != "frozen" and self.name != SMALL and not self.has_batch_norm:
            raise ValueError(
                f"norm has no effect on backbone '{self.name}': it has no batch norm to replace"
            )
        return self

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        if self.frozen_stages > STAGES and not is_timm_vit(self.name):
            raise ValueError(
                f"frozen_stages is {self.frozen_stages}: backbone '{self.name}' has a stem and at "
                f"most four stages, {STAGES} in all"
            )
        if self.outputs is not None and not is_timm_vit(self.name):
            own = f": its own are {self.name}.outputs" if self.name in (VIT, DINOV3) else ""
            raise ValueError(
                f"outputs has no effect on backbone '{self.name}', only on timm's vision "
                f"transformers{own}"
            )
        if self.outputs is not None and not rising(self.outputs):
            raise ValueError(f"outputs {list(self.outputs)} must rise from 1 at least")
        if self.drop_path and not self.has_blocks:
            raise ValueError(
                f"drop_path has no effect on backbone '{self.name}', only on '{VIT}' and timm's "
                "vision transformers"
            )
        return self
