"""The architecture of a detector, from the names and shapes of its tensors.

What tensors do not show (attention heads, dilation, dropout, a two-stage detector's queries, a
temperature) comes from the settings beside them, or is the official default, and is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError
from torch import Tensor

from d3etr.config.base import Section
from d3etr.config.detector import DetectorConfig
from d3etr.detectors.imports.heads_and_queries import decoder_depth
from d3etr.errors import UserError

HEADS = 8
"""Of every official detector; projections of 4 or 16 heads have the same shapes."""
PROPOSALS = 300
"""Queries of the official two-stage detector."""
DROPOUT: Mapping[str, float] = {"dab_detr": 0.0}
"""Of official training where it is not 0.1."""
OFFICIAL_EPSILON, HUGGING_FACES_EPSILON = 1e-3, 1e-5
"""Of DAB-DETR's inverse sigmoid, which moves anchors and boxes."""

BASIC, BOTTLENECK = "basic", "bottleneck"
RESNETS: Mapping[tuple[str, tuple[int, ...]], str] = {
    (BASIC, (2, 2, 2, 2)): "resnet18",
    (BASIC, (3, 4, 6, 3)): "resnet34",
    (BOTTLENECK, (3, 4, 6, 3)): "resnet50",
    (BOTTLENECK, (3, 4, 23, 3)): "resnet101",
    (BOTTLENECK, (3, 8, 36, 3)): "resnet152",
}


class Unseen(Section):
    """What tensors do not show; None where nobody said."""

    heads: Annotated[int, Field(ge=1)] | None = None
    """Attention heads H."""
    dilation: bool | None = None
    """Whether the backbone's last stage is dilated (DC5)."""
    dropout: float | None = None
    """Probability in training."""
    proposals: Annotated[int, Field(ge=1)] | None = None
    """A two-stage detector's queries."""
    temperature: float | None = None
    """Of DAB-DETR's position encoding."""
    epsilon: float = HUGGING_FACES_EPSILON
    """Of DAB-DETR's inverse sigmoid, in the code that the weights belong to."""


def infer_backbone(names: Mapping[str, Tensor]) -> str:
    """The ResNet that tensors ``layer1.0.conv1.weight`` and so on belong to.

    Raises:
        UserError: to none of the known ones.
    """
    blocks = tuple(_count(names, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    kind = BOTTLENECK if "layer1.0.conv3.weight" in names else BASIC
    if (kind, blocks) not in RESNETS:
        raise UserError(
            f"the backbone has {blocks} {kind} blocks in its four stages: expected a ResNet "
            f"({', '.join(RESNETS.values())}); detectors over other backbones cannot be imported"
        )
    return RESNETS[kind, blocks]


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
    whole = tensors.items()
    backbone = {n.removeprefix("backbone."): x for n, x in whole if n.startswith("backbone.")}
    notes = _assumptions(name, unseen)
    heads = unseen.heads or HEADS
    settings: dict[str, Any] = {
        "name": name,
        "backbone": {"name": infer_backbone(backbone), "dilation": unseen.dilation or False},
        "heads": heads,
        "encoder_layers": _count(tensors, r"encoder\.layers\.(\d+)\."),
        "decoder_layers": decoder_depth(tensors),
        "dropout": DROPOUT.get(name, 0.1) if unseen.dropout is None else unseen.dropout,
    }
    try:
        settings |= _sizes(name, tensors)
        settings |= _own_settings(name, tensors, unseen, heads)
        return DetectorConfig.parse(settings), notes
    except KeyError as missing:
        raise UserError(f"tensor {missing} is missing: its shape tells the architecture") from None
    except ValidationError as error:
        found = "; ".join(problem["msg"] for problem in error.errors())
        raise UserError(f"these tensors make no {name}: {found}") from error


def _assumptions(name: str, unseen: Unseen) -> list[str]:
    notes = []
    if unseen.heads is None:
        notes.append(f"attention heads cannot be seen from weights: assumed {HEADS} (--heads)")
    if unseen.dilation is None:
        notes.append(
            "dilation (DC5) cannot be seen from weights: assumed none; if the detector is a DC5 "
            "one, import it with --dilation, or its detections will be wrong"
        )
    if name == "dab_detr" and unseen.temperature is None:
        notes.append(
            "the position encoding's temperature cannot be seen: assumed 20 (--temperature)"
        )
    if name == "dab_detr":
        notes.append(
            f"inverse_sigmoid_epsilon is {unseen.epsilon:g}: the official code has "
            f"{OFFICIAL_EPSILON:g}, Hugging Face's {HUGGING_FACES_EPSILON:g}, whatever the weights"
        )
    return notes


def _sizes(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    last = "decoder." if name == "detr" else "decoder.layers."
    hidden, width = tensors[f"{last}0.feedforward.inner.weight"].shape
    queries = tensors.get("anchors.weight", tensors.get("query_embedding.weight"))
    found = {"width": width, "feedforward": hidden}
    return found if queries is None else found | {"queries": len(queries)}


def _own_settings(
    name: str, tensors: Mapping[str, Tensor], unseen: Unseen, heads: int
) -> dict[str, Any]:
    if name == "dab_detr":
        temperature = float(unseen.temperature or 20.0)
        return {"grid_temperature": temperature, "inverse_sigmoid_epsilon": unseen.epsilon}
    if name != "deformable_detr":
        return {}
    levels = len(tensors["position.level"])
    offsets = len(tensors["decoder.layers.0.cross_attention.offsets.weight"])
    if offsets % (2 * heads * levels):
        raise UserError(
            f"deformable attention has {offsets // 2} sampling offsets, which are no multiple of "
            f"{heads} heads x {levels} levels: give the number of heads with --heads"
        )
    own = {
        "levels": levels,
        "points": offsets // (2 * heads * levels),
        "box_refinement": "decoder.class_heads.1.weight" in tensors,
        "two_stage": "proposals.norm.weight" in tensors,
    }
    return own | ({"queries": unseen.proposals or PROPOSALS} if own["two_stage"] else {})


def _count(names: Mapping[str, Tensor], pattern: str) -> int:
    """Highest number that the pattern's group finds at the beginning of a name, plus one."""
    found = [int(match[1]) for match in (re.match(pattern, name) for name in names) if match]
    return max(found, default=-1) + 1
