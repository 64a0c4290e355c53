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

from d3etr.config.data import PreprocessingConfig
from d3etr.config.detector import BackboneConfig, DetectorConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.dab_detr import DABDETRConfig
from d3etr.detectors.deformable_detr import DeformableDETRConfig
from d3etr.detectors.detr import DETRConfig
from d3etr.detectors.feature_levels import BACKBONE_LEVELS
from d3etr.detectors.imports.categories import UNNAMED, Categories
from d3etr.detectors.imports.settings import HUGGING_FACES_EPSILON, RESNETS
from d3etr.detectors.rt_detr import RTDETRConfig
from d3etr.detectors.torchvision_weights import MEAN, STD
from d3etr.detectors.weights import WeightsInfo
from d3etr.errors import UserError

Settings = dict[str, Any]

WIDTHS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"basic": (64, 128, 256, 512), "bottleneck": (256, 512, 1024, 2048)}
)
"""Channels of a ResNet's four stages."""
_STAGES = 4
_ANY_SIDE = 65_536
"""Longest side of an image, where nothing bounds it: their setting needs a number."""
_PLAIN = {name: network for network, name in RESNETS.items()}
_VD = {f"{name}vd": network for name, network in _PLAIN.items()}
"""ResNet-vd: (kind of block, blocks per stage) by name. transformers has them as RT-DETR's."""


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
    """

    model: Callable[[Any, DetectionTransformer], Settings]
    processor: str
    stages: Callable[[Any], int] = lambda config: 1
    problems: Callable[[Any], list[str]] = lambda config: []


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
            f"transformers has no detector '{config.name}': expected one of {', '.join(KINDS)}"
        )
    kind = KINDS[config.name]
    problems = [*kind.problems(config), *_problems_of_backbone(config.backbone)]
    problems += [*_problems_of_preprocessing(info.preprocessing), *_of_names(info.categories)]
    if problems:
        raise UserError(f"transformers has no such {config.name}: {'; '.join(problems)}")
    unused = config.unused_outputs if isinstance(config, DETRConfig) else 0
    slots = class_slots(info.categories, unused)
    names = dict.fromkeys(range(len(slots) + unused), UNNAMED)
    names |= {slot: name for slot, (_, name) in zip(slots, info.categories, strict=True)}
    model = {
        **kind.model(config, detector),
        "backbone_config": _backbone(config.backbone, kind.stages(config)),
        "id2label": names,
        "label2id": {name: slot for slot, name in names.items()},
    }
    return Described(model, kind.processor, _preprocessing(info.preprocessing), slots)


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


def _rt_detr(config: RTDETRConfig, detector: DetectionTransformer) -> Settings:
    """RT-DETR, or RT-DETRv2 where sampling asks for it; the two are the same otherwise."""
    channels = detector.backbone.stage_channels[-config.levels :]
    settings = {
        "model_type": "rt_detr",
        **_common(config),
        "encoder_hidden_dim": config.encoder_width,
        "encoder_ffn_dim": config.encoder_feedforward,
        "encoder_in_channels": list(channels),
        "decoder_in_channels": [config.encoder_width] * config.levels,
        "feat_strides": list(detector.level_strides),
        "encode_proj_layers": [config.levels - 1],
        "hidden_expansion": config.expansion,
        "num_feature_levels": config.levels,
        "decoder_n_points": config.points,
        # Their denoising queries have an embedding of labels, which not every student learns.
        "num_denoising": 100 if "label_embedding.weight" in detector.state_dict() else 0,
    }
    del settings["dilation"]  # no key of theirs
    if config.sampling == "discrete":
        v2 = {"model_type": "rt_detr_v2", "decoder_method": "discrete"}
        settings |= {**v2, "decoder_n_levels": config.levels}
    return settings


def _problems_of_rt_detr(config: RTDETRConfig) -> list[str]:
    if not config.learned_content:
        return []
    # Both of theirs take the embedding for a tensor and end with an AttributeError (5.23).
    return [
        "its queries have a learned content, with which theirs (learn_initial_query) cannot run: "
        "train one with student.detector.learned_content false"
    ]


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
        "rt_detr": Kind(
            _rt_detr,
            "RTDetrImageProcessor",
            lambda config: int(config.levels),
            _problems_of_rt_detr,
        ),
    }
)
"""By our name of the detector."""


def _backbone(config: BackboneConfig, stages: int) -> Settings:
    """Their backbone, which gives the maps of the last ``stages`` stages."""
    first = _STAGES + 1 - stages
    if config.dilation:  # their own ResNet has none
        return {
            "model_type": "timm_backbone",
            "backbone": config.name,
            "use_pretrained_backbone": False,
            "out_indices": [*range(first, _STAGES + 1)],
            "output_stride": 16,
        }
    block, depths = (_PLAIN | _VD)[config.name]
    return {
        "model_type": "rt_detr_resnet" if config.name in _VD else "resnet",
        "layer_type": block,
        "depths": list(depths),
        "hidden_sizes": list(WIDTHS[block]),
        "embedding_size": 64,
        "out_features": [f"stage{stage}" for stage in range(first, _STAGES + 1)],
    }


def _problems_of_backbone(config: BackboneConfig) -> list[str]:
    networks = _PLAIN | _VD
    if config.name not in networks:
        return [
            f"the backbone is '{config.name}', and only these are its: {', '.join(networks)}; "
            "distil into a detector over one of them"
        ]
    problems = []
    if config.norm == "group":
        problems.append(
            "the backbone has GroupNorm, theirs batch norm: train one with student.detector."
            "backbone.norm 'frozen'"
        )
    if config.dilation and (config.name in _VD or networks[config.name][0] == "basic"):
        problems.append(
            f"a dilated '{config.name}' is not what theirs is: train one with "
            "student.detector.backbone.dilation false, or over resnet50"
        )
    return problems


def _preprocessing(config: PreprocessingConfig) -> Settings:
    # Said in any case: RT-DETR's processor does not normalise unless it is told to.
    pixels = {"do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD)}
    if config.shortest_side is None:
        return {**pixels, "do_resize": False}
    longest = config.longest_side or _ANY_SIDE
    return {**pixels, "size": {"shortest_edge": config.shortest_side, "longest_edge": longest}}


def _problems_of_preprocessing(config: PreprocessingConfig) -> list[str]:
    problems = []
    if config.normalisation != "imagenet":
        problems.append(
            f"its preprocessing normalises '{config.normalisation}', theirs by fixed numbers: "
            "train one with data.preprocessing.normalisation 'imagenet'"
        )
    if config.shortest_side is None and config.longest_side is not None:
        problems.append(
            f"its preprocessing bounds the longest side ({config.longest_side}) without a shortest "
            "one: set data.preprocessing.shortest_side"
        )
    return problems
