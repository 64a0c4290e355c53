"""What ``config.json`` and ``preprocessor_config.json`` of Hugging Face say of a detector of ours.

One function per kind of detector; what transformers has no setting for is collected and refused in
one text. The imports read the same settings (``detectors/imports/settings.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from d3etr.config.backbones import DINOV3
from d3etr.config.data import PreprocessingConfig
from d3etr.config.detector import DetectorConfig
from d3etr.config.dinov3 import MAPS
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.d_fine import DFINEConfig
from d3etr.detectors.dab_detr import DABDETRConfig
from d3etr.detectors.deformable_detr import DeformableDETRConfig
from d3etr.detectors.deimv2 import DEIMv2Config
from d3etr.detectors.detr import DETRConfig
from d3etr.detectors.exports import grouped
from d3etr.detectors.exports.backbones import describe_backbone, problems_of_backbone
from d3etr.detectors.exports.preprocessing import (
    describe_preprocessing,
    problems_of_preprocessing,
)
from d3etr.detectors.feature_levels import BACKBONE_LEVELS
from d3etr.detectors.imports.categories import UNNAMED, Categories
from d3etr.detectors.imports.settings import HUGGING_FACES_EPSILON
from d3etr.detectors.rt_detr import RTDETRConfig
from d3etr.detectors.selection import SelectingConfig
from d3etr.detectors.weights import WeightsInfo
from d3etr.errors import UserError

Settings = dict[str, Any]


@dataclass(frozen=True)
class Described:
    """What the files beside the tensors say.

    Attributes:
        model: of ``config.json``, ``model_type`` included.
        processor: their class of image processors.
        preprocessing: of ``preprocessor_config.json``.
        slots: output of the class head, without "no object", of each class.
    """

    model: Settings
    processor: str
    preprocessing: Settings
    slots: list[int]


@dataclass(frozen=True)
class Kind:
    """One detector of theirs.

    Attributes:
        model: settings of ``config.json`` but backbone and labels, of our detector.
        processor: their class of image processors.
        stages: how many of the backbone's last stages it reads.
        problems: what transformers has no setting for, and what to do about it.
        fuses: levels of twice and half the size, for which images have to be multiples of the
            coarsest stride.
        backbone: their ``backbone_config``, where the kind has a network of its own, whose problems
            are among ``problems``.
        sizes: images that theirs cannot take, and what to do about it.
    """

    model: Callable[[Any, DetectionTransformer], Settings]
    processor: str
    stages: Callable[[Any], int] = lambda config: 1
    problems: Callable[[Any], list[str]] = lambda config: []
    fuses: bool = False
    backbone: Callable[[Any], Settings] | None = None
    sizes: Callable[[Any, PreprocessingConfig], list[str]] = lambda *_: []


def describe(detector: DetectionTransformer, info: WeightsInfo) -> Described:
    """Everything that transformers has to know beside the tensors.

    Args:
        detector: whose weights are exported.
        info: describes it.

    Raises:
        UserError: transformers has no such detector, backbone or preprocessing; all of it is named.
    """
    config = info.detector
    if config.name not in KINDS:
        raise UserError(
            f"transformers has no such detector as '{config.name}', and nothing there could read "
            f"the folder: expected one of {', '.join(KINDS)}. d3etr reads the file as it is"
        )
    kind = KINDS[config.name]
    problems = kind.problems(config)
    if kind.backbone is None:
        problems = [*problems, *_problems_of_network(config)]
    elif not problems:
        problems = kind.sizes(config, info.preprocessing)
    multiple = detector.level_strides[-1] if kind.fuses else 1
    problems += problems_of_preprocessing(info.preprocessing, multiple)
    problems += _of_names(info.categories)
    if problems:
        raise UserError(f"transformers has no such {config.name}: {'; '.join(problems)}")
    unused = config.unused_outputs if isinstance(config, DETRConfig) else 0
    slots = class_slots(info.categories, unused)
    names = dict.fromkeys(range(len(slots) + unused), UNNAMED)
    names |= {slot: name for slot, (_, name) in zip(slots, info.categories, strict=True)}
    model = {
        **kind.model(config, detector),
        "backbone_config": describe_backbone(config.backbone, kind.stages(config))
        if kind.backbone is None
        else kind.backbone(config),
        "id2label": names,
        "label2id": {name: slot for slot, name in names.items()},
    }
    return Described(model, kind.processor, describe_preprocessing(info.preprocessing), slots)


def _problems_of_network(config: DetectorConfig) -> list[str]:
    """Of its backbone; DINOv3 is DEIMv2's, whose problems say what does not go with it."""
    if isinstance(config, DEIMv2Config) and config.backbone.name == DINOV3:
        return []
    return problems_of_backbone(config.backbone)


def class_slots(categories: Categories, unused: int) -> list[int]:
    """The output of each class: its category's id where the import takes it from there again.

    So official detectors of COCO, whose outputs are ids, get theirs back. Otherwise the classes'
    order.

    Args:
        categories: (id, name) of each class.
        unused: outputs that are no class.
    """
    ids = [number for number, _ in categories]
    rising = all(one < other for one, other in pairwise(ids))
    if rising and ids[0] >= 0 and ids[-1] < len(ids) + unused:
        return ids
    return [*range(len(ids))]


def _of_names(categories: Categories) -> list[str]:
    if all(name != UNNAMED for _, name in categories):
        return []
    return [f"a class is called '{UNNAMED}', as outputs without a class are there: rename it"]


def _common(config: DetectorConfig, width: str = "d_model") -> Settings:
    return {
        width: config.width,
        "num_queries": config.queries,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_ffn_dim": config.feedforward,
        "decoder_ffn_dim": config.feedforward,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "dropout": config.dropout,
        "dilation": config.backbone.dilation,
    }


def _detr(config: DETRConfig, detector: DetectionTransformer) -> Settings:
    return {"model_type": "detr", **_common(config)}


def _problems_of_detr(config: DETRConfig) -> list[str]:
    if config.classification == "softmax":
        return []
    return [
        "its classification is 'sigmoid', theirs a softmax: train one with student.detector."
        "classification 'softmax', or a conditional_detr"
    ]


def _conditional(config: DetectorConfig, detector: DetectionTransformer) -> Settings:
    return {"model_type": "conditional_detr", **_common(config)}


def _dab(config: DABDETRConfig, detector: DetectionTransformer) -> Settings:
    temperature = int(config.grid_temperature)
    return {
        "model_type": "dab-detr",
        **_common(config, "hidden_size"),
        "temperature_height": temperature,
        "temperature_width": temperature,
    }


def _problems_of_dab(config: DABDETRConfig) -> list[str]:
    problems = []
    epsilon, temperature = config.inverse_sigmoid_epsilon, config.grid_temperature
    if epsilon != HUGGING_FACES_EPSILON:
        problems.append(
            f"its inverse_sigmoid_epsilon is {epsilon:g}, theirs always "
            f"{HUGGING_FACES_EPSILON:g}: train on with student.detector.inverse_sigmoid_epsilon "
            f"{HUGGING_FACES_EPSILON:g}"
        )
    if not temperature.is_integer():
        problems.append(
            f"its grid_temperature is {temperature:g}, theirs a whole number: train one with such"
        )
    return problems


def _deformable(config: DeformableDETRConfig, detector: DetectionTransformer) -> Settings:
    return {
        "model_type": "deformable_detr",
        **_common(config),
        "num_feature_levels": config.levels,
        "encoder_n_points": config.points,
        "decoder_n_points": config.points,
        "with_box_refine": config.box_refinement,
        "two_stage": config.two_stage,
        "two_stage_num_proposals": config.queries,
    }


def _selecting(config: SelectingConfig, detector: DetectionTransformer) -> Settings:
    """What RT-DETR and its kin have in common."""
    noise = config.denoising
    settings = {
        **_common(config),
        "encoder_hidden_dim": config.encoder_width,
        "encoder_ffn_dim": config.encoder_feedforward,
        "encoder_in_channels": list(detector.backbone.stage_channels[-config.stages :]),
        "decoder_in_channels": [config.encoder_width] * config.levels,
        "feat_strides": list(detector.level_strides),
        "encode_proj_layers": [config.levels - 1],
        "hidden_expansion": config.expansion,
        "num_feature_levels": config.levels,
        "num_denoising": noise.queries,
        "label_noise_ratio": noise.label_noise,
        "box_noise_scale": noise.box_noise,
    }
    del settings["dilation"]  # no key of theirs
    return settings


def _rt_detr(config: RTDETRConfig, detector: DetectionTransformer) -> Settings:
    """RT-DETR, or RT-DETRv2 where sampling asks for it; the two are the same otherwise."""
    settings = {"model_type": "rt_detr", **_selecting(config, detector)}
    settings["decoder_n_points"] = config.points
    if config.sampling == "discrete":
        v2 = {"model_type": "rt_detr_v2", "decoder_method": "discrete"}
        settings |= {**v2, "decoder_n_levels": config.levels}
    return settings


def _d_fine(config: DFINEConfig, detector: DetectionTransformer) -> Settings:
    """Their tensors ``up`` and ``reg_scale`` begin as these settings and are written so."""
    return {
        "model_type": "d_fine",
        **_selecting(config, detector),
        "decoder_n_points": list(config.level_points),
        "depth_mult": config.encoder_blocks / 3,  # of the three blocks of the largest ones
        "max_num_bins": config.bins,
        "up": config.bound,
        "reg_scale": config.curvature,
    }


def _deimv2(config: DEIMv2Config, detector: DetectionTransformer) -> Settings:
    return {
        **_d_fine(config, detector),
        "model_type": "deimv2",
        "encoder_type": config.encoder,
        "encoder_has_trailing_conv": config.fusion == "elan4",
        "use_gateway": config.gateway,
        "share_bbox_head": config.shared_box_head,
        "spatial_tuning_adapter_inplanes": config.backbone.dinov3.detail,
        "decoder_activation_function": config.activation,
    }


def _problems_of_deimv2(config: DEIMv2Config) -> list[str]:
    problems = _problems_of_selecting(config)
    if config.implementation != "transformers":
        problems.append(
            "it computes as the official code, theirs otherwise: train one with student.detector."
            "implementation 'transformers'"
        )
    if config.backbone.name != DINOV3:
        return problems
    if config.stages != MAPS:
        problems.append(
            f"it reads {config.stages} maps of its backbone, theirs {MAPS}: train one with "
            f"student.detector.levels {MAPS} and encoder 'hybrid'"
        )
    if config.backbone.dinov3.normed == "none":
        problems.append(
            "no map of its backbone is normed, theirs always the last one: train one with "
            "student.detector.backbone.dinov3.normed 'last'"
        )
    return problems


def _problems_of_selecting(config: SelectingConfig) -> list[str]:
    if not config.learned_content:
        return []
    # All of theirs take the embedding for a tensor and end with an AttributeError (5.23).
    return [
        "its queries have a learned content, with which theirs (learn_initial_query) cannot run: "
        "train one with student.detector.learned_content false"
    ]


def _problems_of_d_fine(config: DFINEConfig) -> list[str]:
    problems = _problems_of_selecting(config)
    if config.activation != "relu":
        problems.append(
            f"its activation is '{config.activation}', theirs always 'relu': train one with "
            "student.detector.activation 'relu', or a deimv2"
        )
    return problems


def _of_selecting(
    model: Callable[[Any, DetectionTransformer], Settings],
    problems: Callable[[Any], list[str]] = _problems_of_selecting,
) -> Kind:
    return Kind(
        model,
        "RTDetrImageProcessor",
        lambda config: int(config.stages),
        problems,
        fuses=True,
    )


# Of RF-DETR's own processor, which does not smooth what it shrinks, images would be others.
_GROUPED = Kind(
    grouped.settings,
    "DeformableDetrImageProcessor",
    problems=grouped.problems,
    backbone=grouped.backbone,
    sizes=grouped.problems_of_sizes,
)
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "detr": Kind(_detr, "DetrImageProcessor", problems=_problems_of_detr),
        "conditional_detr": Kind(_conditional, "ConditionalDetrImageProcessor"),
        # DAB-DETR has no processor of its own there.
        "dab_detr": Kind(_dab, "ConditionalDetrImageProcessor", problems=_problems_of_dab),
        "deformable_detr": Kind(
            _deformable,
            "DeformableDetrImageProcessor",
            lambda config: min(config.levels, BACKBONE_LEVELS),
        ),
        "rt_detr": _of_selecting(_rt_detr),
        # Its processor is RT-DETR's, too.
        "d_fine": _of_selecting(_d_fine, _problems_of_d_fine),
        "deimv2": _of_selecting(_deimv2, _problems_of_deimv2),
        "lw_detr": _GROUPED,
        "rf_detr": _GROUPED,
    }
)
"""By our name of the detector."""
