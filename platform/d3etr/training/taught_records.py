"""What a teacher says about an image as bytes of one length, and back, to the last bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from d3etr.attention_maps import AttentionMaps, ProductMaps, ScoredMaps
from d3etr.distillation.teaching import Taught
from d3etr.structures import DecoderOutputs, Levels

# Name to the dimension that runs over images.
_PARTS = {
    "logits": 1,
    "boxes_cxcywh": 1,
    "self_maps.query": 1,
    "self_maps.key": 1,
    "self_maps.values": 1,
    "cross_maps.query": 1,
    "cross_maps.key": 1,
    "cross_maps.values": 1,
    "states": 0,
    "tokens": 0,
}
_ALIGNMENT = 8
"""Bytes; a part can be read as any type from there."""


@dataclass(frozen=True)
class Part:
    """One tensor in a record.

    Attributes:
        name: of the field of ``DecoderOutputs``, dotted within maps, or ``tokens``.
        dtype: of its values.
        shape: of one image's values.
        start: bytes before it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """Where its bytes end."""
        return self.start + self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class RecordLayout:
    """Where a record holds what; the same for all images of one size.

    Attributes:
        parts: in order.
        levels: the memory's grids.
        exclusive: as in ``DecoderOutputs``.
    """

    parts: tuple[Part, ...]
    levels: Levels
    exclusive: bool

    @staticmethod
    def of(taught: Taught) -> RecordLayout:
        """The layout of any batch like this one, which has no padding."""
        parts, start = [], 0
        for name, values in _tensors(taught):
            shape = values.select(_PARTS[name], 0).shape
            part = Part(name, values.dtype, tuple(shape), start)
            parts.append(part)
            start = -(-part.stop // _ALIGNMENT) * _ALIGNMENT
        return RecordLayout(tuple(parts), taught.outputs.levels, taught.outputs.exclusive)

    @property
    def record_bytes(self) -> int:
        """Bytes of an image's record."""
        return -(-self.parts[-1].stop // _ALIGNMENT) * _ALIGNMENT

    def describe(self) -> str:
        """Text that only equal layouts share."""
        parts = [(part.name, str(part.dtype), part.shape) for part in self.parts]
        return json.dumps([parts, self.levels, self.exclusive])

    def pack(self, taught: Taught) -> Tensor:
        """[B, record_bytes] uint8 on the host."""
        values = dict(_tensors(taught))
        images = taught.outputs.logits.shape[1]
        records = torch.zeros(images, self.record_bytes, dtype=torch.uint8)
        for part in self.parts:
            rows = values[part.name].movedim(_PARTS[part.name], 0).flatten(1).contiguous()
            records[:, part.start : part.stop] = rows.cpu().view(torch.uint8)
        return records

    def unpack(self, records: Tensor) -> tuple[DecoderOutputs, Tensor | None]:
        """Outputs, and tokens where there are any, of [B, record_bytes] records.

        Args:
            records: uint8, on the device that the outputs are to be on.
        """
        values = self._values(records)
        outputs = DecoderOutputs(
            values["logits"],
            values["boxes_cxcywh"],
            _maps(values, "self_maps"),
            _maps(values, "cross_maps"),
            self.levels,
            states=values.get("states"),
            exclusive=self.exclusive,
        )
        return outputs, values.get("tokens")

    def difference(self, left: Tensor, right: Tensor) -> float:
        """The largest of |a - b| / (1 + |a|) over all values of two batches of records."""
        ours, theirs = self._values(left), self._values(right)
        pairs = [(ours[name].double(), theirs[name].double()) for name in ours]
        return max(float(((a - b).abs() / (1 + a.abs())).max()) for a, b in pairs)

    def _values(self, records: Tensor) -> dict[str, Tensor]:
        return {part.name: _read(part, records) for part in self.parts}


def _tensors(taught: Taught) -> Iterator[tuple[str, Tensor]]:
    for name in _PARTS:
        field, _, within = name.partition(".")
        value = taught.tokens if name == "tokens" else getattr(taught.outputs, field)
        if within:
            value = getattr(value, within, None)
        if value is not None:
            yield name, value


def _maps(values: Mapping[str, Tensor], field: str) -> AttentionMaps | None:
    if f"{field}.values" in values:
        return ScoredMaps(values[f"{field}.values"])
    query = values.get(f"{field}.query")
    return None if query is None else ProductMaps(query, values[f"{field}.key"])


def _read(part: Part, records: Tensor) -> Tensor:
    rows = records[:, part.start : part.stop].view(part.dtype)
    return rows.reshape(-1, *part.shape).movedim(0, _PARTS[part.name]).contiguous()
