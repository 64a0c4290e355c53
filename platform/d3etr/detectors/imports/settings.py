"""The architecture of a detector: from its tensors, and from the settings beside them.

What tensors do not show (attention heads, dilation, dropout, a two-stage detector's queries, a
temperature) comes from a checkpoint's ``args``, a ``config.json`` or the user, or is the official
default, and is said. Settings that would make another detector of the same tensors are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from torch import Tensor

from d3etr.config.backbones import RESNET_VD, family_of
from d3etr.config.base import Section
from d3etr.config.detector import DetectorConfig
from d3etr.detectors.imports import hgnet
from d3etr.detectors.imports.layouts import LAYOUTS, decoder_depth
from d3etr.detectors.imports.preprocessing import require
from d3etr.errors import UserError
from d3etr.registry import DETECTORS

HEADS, PROPOSALS, TEMPERATURE = 8, 300, 20.0
"""Of the official detectors; projections of 4 or 16 heads have the same shapes."""
_TEMPERED = ("dab_detr", "dino")
"""Detectors whose position encoding has a temperature that differs."""
_DROPPING = ("detr", "conditional_detr", "deformable_detr")
"""Detectors that are trained with a dropout of 0.1 officially, the others without any."""
OFFICIAL_EPSILON, HUGGING_FACES_EPSILON = 1e-3, 1e-5
"""Of DAB-DETR's inverse sigmoid, which moves anchors and boxes."""

RESNETS: Mapping[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
_DECODER_LAYER = r"decoder\.(layers\.)?0\."
_LEVEL = r"(?:encoder\.)?levels\.(\d+)\.(?:conv|norm)\."
_SIZES = (
    ("feedforward", rf"{_DECODER_LAYER}feedforward\.inner\.weight", 0),
    ("width", rf"{_DECODER_LAYER}feedforward\.inner\.weight", 1),
    ("queries", r"(anchors|query_embedding)\.weight", 0),
    ("levels", r"position\.level", 0),
    ("offsets", rf"{_DECODER_LAYER}cross_attention\.offsets\.weight", 0),
)
"""A size, a pattern of the tensor that shows it, and along which of its dimensions."""

_ONLY: Mapping[str, tuple[Any, ...]] = {
    "masks": (False,),
    "pre_norm": (False,),
    "position_embedding": ("sine", "v2"),
    "position_embedding_scale": (2 * math.pi,),
    "num_patterns": (0,),
    "position_embedding_type": ("sine",),
    "query_dim": (4,),
    "keep_query_pos": (False,),
    "normalize_before": (False,),
    "sine_position_embedding_scale": (None, 2 * math.pi),
    "num_channels": (3,),
}
"""Settings of official ``args`` and of ``config.json`` that our detectors have."""
_ONLY_BACKBONE: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("resnet", "timm_backbone", "rt_detr_resnet", "hgnet_v2"),
    "hidden_act": ("relu",),
    "downsample_in_first_stage": (False,),
    "downsample_in_bottleneck": (False,),
    **hgnet.ONLY,
}


class Unseen(Section):
    """What tensors do not show; None where it is not known."""

    heads: Annotated[int, Field(ge=1)] | None = None
    """Attention heads H."""
    dilation: bool | None = None
    """Whether the backbone's last stage is dilated (DC5)."""
    temperature: float | None = None
    """Of DAB-DETR's and DINO's position encoding."""
    dropout: float | None = None
    """Probability in training."""
    sampling: Literal["bilinear", "discrete"] | None = None
    """What RT-DETRv2's deformable attention reads."""
    activation: Literal["relu", "silu"] | None = None
    """Within decoder and heads of D-FINE and DEIMv2."""
    proposals: Annotated[int, Field(ge=1)] | None = None
    """A two-stage detector's queries."""
    epsilon: float = HUGGING_FACES_EPSILON
    """Of DAB-DETR's inverse sigmoid, in the code that the weights belong to."""
    own: dict[str, Any] = Field(default_factory=dict)
    """Keys of the kind's own configuration."""


def from_args(args: Mapping[str, Any], name: str, where: str) -> Unseen:
    """What the official training code was called with.

    Args:
        args: of a checkpoint; may be empty.
        name: our name of the detector.
        where: for error texts.

    Raises:
        UserError: settings of a detector that is not ours.
    """
    layout = LAYOUTS[name]
    require(args, {**_ONLY, **layout.only_args}, f"{where}: args")
    if "enc_n_points" in args:
        _equal(args, "enc_n_points", "dec_n_points", where)
    return _unseen(
        where,
        heads=args.get("nheads"),
        dilation=args.get("dilation"),
        dropout=args.get("dropout"),
        proposals=args.get("num_queries"),
        temperature=_equal(args, "pe_temperatureH", "pe_temperatureW", where),
        epsilon=OFFICIAL_EPSILON,
        own=layout.of_args(args),
    )


def from_config(config: Mapping[str, Any], where: str) -> tuple[str, Unseen]:
    """Our name of a Hugging Face model, and what its tensors do not show.

    Args:
        config: of ``config.json``.
        where: for error texts.

    Raises:
        UserError: a model that is not ours.
    """
    names = {kind: name for name, layout in LAYOUTS.items() for kind in layout.model_types}
    name = names.get(str(config.get("model_type")))
    if name is None:
        raise UserError(
            f"{where}: model_type is {config.get('model_type')}; expected one of "
            f"{', '.join(sorted(names))}"
        )
    architectures = config.get("architectures") or ["ForObjectDetection"]
    if not any(str(kind).endswith("ForObjectDetection") for kind in architectures):
        raise UserError(
            f"{where}: architectures is {architectures}: expected a ...ForObjectDetection; "
            "masks and models without heads cannot be imported"
        )
    require(config, {**_ONLY, **LAYOUTS[name].only}, where)
    attends = config.get("encoder_type") != "lite"
    if attends and {"encode_proj_layers", "encoder_in_channels"} <= config.keys():
        coarsest = len(config["encoder_in_channels"]) - 1  # attention is within it alone
        require(config, {"encode_proj_layers": ([coarsest],)}, where)
    if "encoder_n_points" in config:
        _equal(config, "encoder_n_points", "decoder_n_points", where)
    backbone = config.get("backbone_config") or {}
    kinds, one = LAYOUTS[name].networks, LAYOUTS[name].only_backbone
    own_network = kinds.get(str(backbone.get("model_type")), one)
    require(
        backbone,
        _ONLY_BACKBONE if own_network is None else own_network,
        f"{where}: backbone_config",
    )
    # Their own networks have no dilation; timm's have, by one of three keys.
    strides = [
        part.get("output_stride") for part in (backbone, config.get("backbone_kwargs") or {})
    ]
    own = backbone.get("model_type", "timm_backbone") != "timm_backbone"
    dilation = not own and (config.get("dilation") or 16 in strides)
    return name, _unseen(
        where,
        heads=_equal(config, "encoder_attention_heads", "decoder_attention_heads", where) or HEADS,
        dilation=bool(dilation),
        dropout=config.get("dropout"),
        activation=config.get("decoder_activation_function"),
        proposals=config.get("two_stage_num_proposals", config.get("num_queries")),
        own=LAYOUTS[name].unseen(config),
        temperature=_equal(config, "temperature_height", "temperature_width", where) or TEMPERATURE,
    )


def infer_detector(
    name: str, tensors: Mapping[str, Tensor], unseen: Unseen
) -> tuple[DetectorConfig, list[str]]:
    """The configuration of a detector, and what had to be assumed.

    Args:
        name: our name of the detector.
        tensors: all of them, by our names.
        unseen: what they do not show.

    Raises:
        UserError: tensors that tell the architecture are missing, or make none that exists.
    """
    layout = LAYOUTS[name]
    backbone = None if layout.backbone is None else layout.backbone(tensors, unseen.own)
    if backbone is None:
        backbone = {"name": _infer_backbone(tensors), "dilation": unseen.dilation or False}
    sizes = {
        key: tensors[found].shape[dimension]
        for key, pattern, dimension in _SIZES
        if (found := next((key for key in tensors if re.fullmatch(pattern, key)), None))
    }
    own = unseen.own | layout.architecture(tensors)
    if "levels" not in sizes and (levels := _count(tensors, _LEVEL)):
        sizes["levels"] = levels
    if "width" not in sizes:
        raise UserError("the decoder's feedforward.inner.weight is missing: it shows the width")
    if "points" in own and "offsets" in sizes:
        shown = _heads(sizes["offsets"], own["points"], unseen)
        unseen = unseen.model_copy(update={"heads": shown})
    heads, dropout = unseen.heads or HEADS, 0.1 if name in _DROPPING else 0.0
    settings: dict[str, Any] = {
        **sizes,
        "name": name,
        "backbone": backbone,
        "heads": heads,
        "encoder_layers": _count(tensors, r"encoder\.layers\.(\d+)\."),
        "decoder_layers": decoder_depth(tensors),
        "dropout": dropout if unseen.dropout is None else unseen.dropout,
        "points": own["points"]
        if "points" in own
        else _points(sizes, own.get("cross_heads", heads)),
        "box_refinement": "decoder.class_heads.1.weight" in tensors,
        "two_stage": "proposals.norm.weight" in tensors,
        "grid_temperature": float(unseen.temperature or TEMPERATURE),
        "inverse_sigmoid_epsilon": unseen.epsilon,
        "activation": unseen.activation or layout.activation,
    }
    if "queries" not in sizes:
        settings["queries"] = unseen.proposals or PROPOSALS
    known = DETECTORS.find(name).config_class.model_fields
    settings = {k: v for k, v in (settings | own).items() if k in known}
    try:
        config = DetectorConfig.parse(settings)
    except ValidationError as error:
        found = "; ".join(problem["msg"] for problem in error.errors())
        raise UserError(f"these tensors make no {name}: {found}") from error
    return config, _assumptions(config, unseen)


def _infer_backbone(tensors: Mapping[str, Tensor]) -> str:
    """The network that tensors by our names belong to: a ResNet, a ResNet-vd or an HGNetV2."""
    if (hgnet_v2 := hgnet.name_of(tensors)) is not None:
        return hgnet_v2
    blocks = tuple(_count(tensors, rf"backbone\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    kind = "bottleneck" if "backbone.layer1.0.conv3.weight" in tensors else "basic"
    deep = "backbone.conv1.6.weight" in tensors  # the stem of a ResNet-vd
    names = {key: f"{name}vd" if deep else name for key, name in RESNETS.items()}
    known = {key: name for key, name in names.items() if not deep or name in RESNET_VD}
    if (kind, blocks) not in known:
        raise UserError(
            f"the backbone has {blocks} {kind} blocks in its four stages: expected a ResNet "
            f"({', '.join(known.values())}) or an HGNetV2; detectors over other backbones cannot "
            "be imported"
        )
    return known[kind, blocks]


def _heads(offsets: int, points: Sequence[int], unseen: Unseen) -> int:
    """Attention heads of so many sampling offsets, where a level's points are known."""
    heads, left = divmod(offsets, 2 * sum(points))
    if left or unseen.heads not in (None, heads):
        said = "" if unseen.heads is None else f", and {unseen.heads} heads are asked for"
        raise UserError(
            f"deformable attention has {offsets // 2} sampling offsets of {sum(points)} points for "
            f"each head{said}: expected {heads or 1} heads and {sum(points)} offsets for each"
        )
    return heads


def _points(sizes: Mapping[str, int], heads: int) -> int:
    """Sampling points per head and level of deformable attention, if there is any."""
    offsets, levels = sizes.get("offsets", 0), sizes.get("levels", 1)
    each = 2 * heads * levels
    if offsets % each:
        raise UserError(
            f"deformable attention has {offsets // 2} sampling offsets, which are no multiple of "
            f"{heads} heads x {levels} levels: give the number of heads with --heads"
        )
    return offsets // each


def _assumptions(config: DetectorConfig, unseen: Unseen) -> list[str]:
    name, notes = config.name, []
    if unseen.heads is None:
        notes.append(
            f"attention heads cannot be seen from weights: assumed {config.heads} (--heads)"
        )
    if unseen.dilation is None and family_of(config.backbone.name) == "ResNet":
        notes.append(
            "dilation (DC5) cannot be seen from weights: assumed none; if the detector is a DC5 "
            "one, import it with --dilation, or its detections will be wrong"
        )
    if name == "d_fine" and unseen.activation is None:
        notes.append(
            "the activation cannot be seen from weights: assumed relu, D-FINE's; if it is DEIM's "
            "detector, import it with --activation silu, or its detections will be wrong"
        )
    if name in _TEMPERED and unseen.temperature is None and "grid_temperature" not in unseen.own:
        notes.append(
            "the position encoding's temperature cannot be seen: assumed 20 (--temperature)"
        )
    if name == "dab_detr":
        notes.append(
            f"inverse_sigmoid_epsilon is {unseen.epsilon:g}: the official code has "
            f"{OFFICIAL_EPSILON:g}, Hugging Face's {HUGGING_FACES_EPSILON:g}, whatever the weights"
        )
    return notes


def _count(names: Mapping[str, Tensor], pattern: str) -> int:
    """Highest number that the pattern's group finds at the beginning of a name, plus one."""
    found = [int(match[1]) for match in (re.match(pattern, name) for name in names) if match]
    return max(found, default=-1) + 1


def _unseen(where: str, **values: Any) -> Unseen:
    try:
        return Unseen(**values)
    except ValidationError as error:
        problems = (f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
        raise UserError(f"{where}: broken settings: {'; '.join(problems)}") from error


def _equal(settings: Mapping[str, Any], one: str, other: str, where: str) -> Any:
    """The value of two keys that have to agree, or None."""
    if settings.get(one) != settings.get(other):
        raise UserError(
            f"{where}: {one} is {settings.get(one)} and {other} is {settings.get(other)}: "
            "expected the same number; this variant cannot be imported"
        )
    return settings.get(one)
