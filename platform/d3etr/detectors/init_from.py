"""Which tensors are which part of a detector, and a detector that starts from another's parts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from d3etr.config.detector import DetectorConfig, DetectorPart
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.feature_levels import LevelPositions
from d3etr.detectors.narrowing import Narrowing
from d3etr.errors import UserError

PARTS: Mapping[str, DetectorPart] = MappingProxyType(
    {
        "backbone.": "backbone",
        "projection.": "encoder",
        "levels.": "encoder",
        "position.": "encoder",
        "encoder.": "encoder",
        "decoder.": "decoder",
        "decoder_norm.": "decoder",
        "class_head.": "heads",
        "box_head.": "heads",
        "decoder.class_heads.": "heads",
        "decoder.box_heads.": "heads",
        "decoder.first_box_head.": "heads",
        "decoder.quality_heads.": "heads",
        "proposals.class_head.": "heads",
        "proposals.box_head.": "heads",
        "query_embedding.": "queries",
        "query_content.": "queries",
        "reference_moves.": "queries",
        "label_embedding.": "queries",
        "anchors.": "queries",
        "ref_point_head.": "queries",
        "reference_head.": "queries",
        "proposals.": "queries",
    }
)
"""Beginning of a tensor's name -> its part; the longest one that fits counts."""
_SELECTION = re.compile(r"^proposals\.\d+\.")
"""Beginning of names of a selection, of detectors with one for each group of queries."""
_CLASS_HEADS = (
    "class_head.",
    "decoder.class_heads.",
    "proposals.class_head.",
    "label_embedding.",
)
_LAYER = re.compile(r"^(decoder\.(?:(?:layers|class_heads|box_heads|quality_heads)\.)?)(\d+)\.")
"""Beginning of a name that belongs to a decoder layer, and its number."""
_UNSHOWN = ("activation", "bound", "curvature", "sampling", "implementation")
"""Keys that decide what decoder and heads compute, and that no shape shows."""
_UNSHOWN_OF_BACKBONES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"vit": ("heads",), "dinov3": ("heads", "feedforward")}
)
"""Likewise of a backbone's own section."""
_SHOWN = 4
_NAMED = 12
"""More tensors than these are counted by module: of another expansion, an encoder has hundreds."""
_CELLS = {True: "cells by their centres", False: "cells by their far edges"}


@dataclass(frozen=True)
class LoadedParts:
    """What became of the tensors of the parts that were asked for.

    Attributes:
        names: of the tensors that were taken.
        left: name of each tensor that was not -> why.
    """

    names: tuple[str, ...]
    left: Mapping[str, str]

    def left_in_words(self) -> str:
        """What was not taken: each tensor with its reason, or of many, how many of each module."""
        if len(self.left) <= _NAMED:
            return ", ".join(f"{name} ({why})" for name, why in self.left.items())
        left, taken = (Counter(map(_module_of, names)) for names in (self.left, self.names))
        return ", ".join(
            f"{module} ({count} of {count + taken[module]} tensors)"
            for module, count in left.items()
        )


def _module_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


def part_of(name: str) -> DetectorPart:
    """The part that a tensor of any detector belongs to.

    Raises:
        UserError: of a detector that is not ours, whose names do not tell.
    """
    plain = _SELECTION.sub("proposals.", name)
    fitting = [prefix for prefix in PARTS if plain.startswith(prefix)]
    if not fitting:
        modules = ", ".join(sorted({prefix.partition(".")[0] for prefix in PARTS}))
        raise UserError(
            f"nothing tells which part of a detector {name} is: call its module one of {modules}, "
            "or put it into one"
        )
    return PARTS[max(fitting, key=len)]


def load_matching(
    detector: DetectionTransformer,
    source: DetectionTransformer,
    parts: Sequence[DetectorPart],
    *,
    same_classes: bool,
    layers: Sequence[int] | None = None,
    narrows: bool = False,
) -> LoadedParts:
    """Start parts of a detector as another one's: every tensor of the same name and shape.

    Backbones are taken as a whole or not at all.

    Args:
        detector: changed in place, once all parts are known to fit; ``inherited`` says what was
            taken.
        source: may be of another architecture.
        parts: to take.
        same_classes: whether class k is the same in both; else class heads are left.
        layers: the source's decoder layer for each of the detector's; None: its first ones.
        narrows: take decoder, heads and queries of a wider source by ``Narrowing``.

    Raises:
        UserError: of a part nothing fits, a backbone is another one, or attention has another
            number of heads, positions another encoding, or decoder and heads compute something
            else by their tensors, of which shapes say nothing.
    """
    offered = _narrowed(detector, source, parts) if narrows else source.state_dict()
    found = _numbered(detector.state_dict(), offered, layers)
    ours = {name: x for name, x in detector.state_dict().items() if part_of(name) in parts}
    reasons = {name: _misfit(name, x, found, same_classes) for name, x in ours.items()}
    left = {name: reason for name, reason in reasons.items() if reason is not None}
    for part in parts:
        names = [name for name in ours if part_of(name) == part]
        # A matrix at least: between detectors of other widths a few biases fit by chance.
        if not any(name not in left and ours[name].dim() > 1 for name in names):
            misfits = [f"{name} ({left[name]})" for name in names if name in left]
            more = f" and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
            raise UserError(f"nothing of its {part} fits: {', '.join(misfits[:_SHOWN])}{more}")
    _ensure_same_heads(detector, source, parts)
    _ensure_same_points(detector, source, parts)
    _ensure_same_positions(detector, source, parts)
    _ensure_same_computation(detector, source, parts)
    others = set(detector.backbone.state_dict()) != set(source.backbone.state_dict())
    if "backbone" in parts and (others or any(part_of(name) == "backbone" for name in left)):
        mine, theirs = detector.config.backbone, source.config.backbone
        raise UserError(
            f"its backbone is {theirs.name} with norm '{theirs.norm}', the student's {mine.name} "
            f"with '{mine.norm}', or of other widths: take 'backbone' out of the parts, or "
            "configure the same one"
        )
    if "backbone" in parts:
        _ensure_same_blocks(detector, source)
    taken = {name: found[name] for name in ours if name not in left}
    detector.load_state_dict(taken, strict=False)
    detector.inherited = frozenset(taken)
    return LoadedParts(tuple(taken), left)


def _ensure_same_heads(
    detector: DetectionTransformer, source: DetectionTransformer, parts: Sequence[DetectorPart]
) -> None:
    mine, theirs = detector.config, source.config
    for heads, key, what in (
        ((mine.heads, theirs.heads), "heads", "attention heads"),
        (
            (mine.cross_attention_heads, theirs.cross_attention_heads),
            "cross_heads",
            "heads of attention to the memory",
        ),
    ):
        if heads[0] != heads[1] and not {"encoder", "decoder"}.isdisjoint(parts):
            raise UserError(
                f"it has {heads[1]} {what}, the student {heads[0]}: the same projections "
                f"would mean something else. Set student.detector.{key} to {heads[1]}"
            )


def _ensure_same_points(
    detector: DetectionTransformer, source: DetectionTransformer, parts: Sequence[DetectorPart]
) -> None:
    """As many places in all, divided among feature levels in another way, have the same shapes."""
    offsets = {part_of(name) for name in detector.state_dict() if name.endswith("offsets.weight")}
    ours, theirs = (_level_points(x.config) for x in (detector, source))
    if offsets.isdisjoint(parts) or ours == theirs or sum(ours) != sum(theirs):
        return
    raise UserError(
        f"it samples {[*theirs]} places on its feature levels, the student {[*ours]}: the same "
        "projections would mean something else. Set student.detector.levels and points to its, or "
        f"take {' and '.join(repr(part) for part in sorted(offsets & {*parts}))} out of the parts"
    )


def _level_points(config: DetectorConfig) -> tuple[int, ...]:
    """Places that each head samples on each feature level; none of a detector that does not."""
    points = getattr(config, "points", ())
    return (points,) * config.feature_levels if isinstance(points, int) else points


def _ensure_same_blocks(detector: DetectionTransformer, source: DetectionTransformer) -> None:
    """Heads and gates of a vision transformer are in no tensor's shape."""
    mine, theirs = detector.config.backbone, source.config.backbone
    section = mine.name
    for key in _UNSHOWN_OF_BACKBONES.get(section, ()):
        ours, its = (getattr(getattr(x, section), key) for x in (mine, theirs))
        if ours != its:
            raise UserError(
                f"its backbone has {key} {its}, the student's {ours}: the same tensors would mean "
                f"something else. Set student.detector.backbone.{section}.{key} to {its}, or take "
                "'backbone' out of the parts"
            )


def _ensure_same_positions(
    detector: DetectionTransformer, source: DetectionTransformer, parts: Sequence[DetectorPart]
) -> None:
    """Tokens of Deformable DETR and of DINO may have another encoding of the same cells."""
    ours, theirs = (
        (x.temperature, x.centred) if isinstance(x, LevelPositions) else None
        for x in (getattr(part, "position", None) for part in (detector, source))
    )
    if "encoder" not in parts or None in (ours, theirs) or ours == theirs:
        return
    assert ours is not None and theirs is not None
    keys = (
        f"set student.detector.grid_temperature to {theirs[0]:g} and grid_centred to "
        f"{str(theirs[1]).lower()}, or take"
    )
    raise UserError(
        f"its encoder was trained with a position encoding of temperature {theirs[0]:g}, "
        f"{_CELLS[theirs[1]]}, the student's has {ours[0]:g}, {_CELLS[ours[1]]}: "
        f"{keys if 'grid_centred' in type(detector.config).model_fields else 'take'} 'encoder' "
        "out of the parts"
    )


def _ensure_same_computation(
    detector: DetectionTransformer, source: DetectionTransformer, parts: Sequence[DetectorPart]
) -> None:
    """D-FINE's bins, DEIM's activation and RT-DETRv2's sampling are in no tensor's shape."""
    if {"decoder", "heads"}.isdisjoint(parts):
        return
    ours, theirs = (dict(x.config) for x in (detector, source))
    other = [key for key in _UNSHOWN if key in ours and key in theirs and ours[key] != theirs[key]]
    if other:
        raise UserError(
            f"it has {_in_words(other, theirs)}, the student {_in_words(other, ours)}: the same "
            "tensors of decoder and heads would mean something else. Set "
            + " and ".join(f"student.detector.{key} to {_shown(theirs[key])}" for key in other)
            + ", or take 'decoder' and 'heads' out of the parts"
        )


def _in_words(keys: Sequence[str], values: Mapping[str, object]) -> str:
    return " and ".join(f"{key} {_shown(values[key])}" for key in keys)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _narrowed(
    detector: DetectionTransformer, source: DetectionTransformer, parts: Sequence[DetectorPart]
) -> Mapping[str, Tensor]:
    """The source's tensors, those of the decoder's stream in the detector's width."""
    state, config = source.state_dict(), detector.config
    if source.config.width == config.width:
        return state
    _ensure_same_heads(detector, source, parts)
    narrow = Narrowing(state, config.heads, config.width, config.feedforward)
    streamed = {"decoder", "heads", "queries"} & {*parts}
    return {
        name: narrow.tensor(name) if part_of(name) in streamed else state[name] for name in state
    }


def _numbered(
    ours: Mapping[str, Tensor], found: Mapping[str, Tensor], layers: Sequence[int] | None
) -> Mapping[str, Tensor]:
    """The source's tensors by the names that they have in a detector of the chosen layers."""
    if layers is None:
        return found
    renamed = {}
    for name in ours:
        there = _LAYER.sub(lambda match: f"{match[1]}{layers[int(match[2])]}.", name, count=1)
        # Not there: of the first layer only, or of a head that all layers share.
        there = there if there in found else name
        if there in found:
            renamed[name] = found[there]
    return renamed


def _misfit(
    name: str, tensor: Tensor, found: Mapping[str, Tensor], same_classes: bool
) -> str | None:
    if name not in found:
        return "not there"
    if found[name].shape != tensor.shape:
        return f"{list(tensor.shape)}, there {list(found[name].shape)}"
    class_head = _SELECTION.sub("proposals.", name).startswith(_CLASS_HEADS)
    if class_head and not same_classes:
        return "of other classes there"
    return None
