"""A detector's decoder, heads and queries in another width, by principal directions (our choice).

All matrices that read or write the decoder's stream (its residual states and the queries'
embeddings) share one projection P with orthonormal rows: onto the principal directions of what is
written, turned so that each row is as close to one channel as it can be. That keeps what layer
norms do channel by channel: where the stream has no more directions than the student has channels,
as copies of channels, outputs are the wider detector's. Within a head, queries and keys have a
projection of their own in each module, and so have values; hidden layers keep their most used
neurons; what reads the memory or its positions keeps the channels of the nearest frequencies, as
the student's memory is learned anew.

Shapes: W width of the source · w of the student · H heads · E = W / H.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from scipy.linalg import qr
from torch import Tensor

from d3etr.errors import UserError

Axis = tuple[str, ...]
_ATTENTION: Mapping[str, tuple[Axis, str]] = {
    "query_key": (("match", "match"), "stream"),
    "content": (("match", "match", "value"), "stream"),
    "position": (("match", "match"), "stream"),
    "query": (("match",), "stream"),
    "query_content": (("match",), "stream"),
    "query_embedding": (("match",), "stream"),
    "query_spatial": (("match",), "place"),
    "key": (("match",), "place"),
    "key_value": (("match", "value"), "place"),
    "key_position": (("match",), "place"),
    "output": (("stream",), "value"),
    "offsets": (("same",), "stream"),
    "weights": (("same",), "stream"),
}
"""Linear map of an attention module -> what its rows are, one block after the other, and its
columns."""
_PERCEPTRON = re.compile(
    r"^(.*(?:query_scale|(?:ref_point|size|anchor)_head|box_heads?(?:\.\d+)?))\.layers\.(\d+)$"
)
_ATTENTION_MODULE = re.compile(r"^(.*(?:self|cross)_attention)\.(\w+)$")
_EMBEDS_ANCHORS = "decoder.anchor_head"
"""DAB-DETR's network from encoded anchors to the queries' embeddings."""
_COORDINATES = re.compile(r"(anchors|feedforward\.activation)$")
"""Modules without a channel of the stream."""
_TABLES = ("query_embedding.weight", "query_content.weight")
"""Tables whose columns are channels of the stream."""
_NORM = re.compile(r"(^|[._])norm$")
_READS_STREAM = re.compile(r"(class_head|class_heads\.\d+|reference_head)$")


class Narrowing:
    """Tensors of a wider detector as a narrower one has them.

    Args:
        state: of the wider detector: decoder, heads and queries.
        heads: H of both.
        width: w.
        feedforward: hidden channels of the narrower detector's layers.
    """

    def __init__(
        self, state: Mapping[str, Tensor], heads: int, width: int, feedforward: int
    ) -> None:
        self._state, self._heads, self._width = state, heads, width
        self._feedforward = feedforward
        writers = [
            *(_columns(x) for name, x in state.items() if _writes_stream(name)),
            *(state[name].double().T for name in _TABLES if name in state),
        ]
        self._source = writers[0].shape[0]
        if width > self._source:
            raise UserError(
                f"its width {self._source} is below the student's {width}: principal directions "
                "only make a detector narrower"
            )
        self.stream = principal_rows(writers, width)
        self.place = nearest_frequencies(self._source, width)

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name.

        Raises:
            UserError: nobody knows what its axes are.
        """
        module, _, kind = name.rpartition(".")
        values = self._state[name].double()
        if _NORM.search(module):
            gain = (self.stream.square() @ values) * (self._source / self._width) ** 0.5
            narrow = gain if kind == "weight" else self.stream @ values
        else:
            rows, columns = self._axes(module)
            narrow = values if rows is None else rows @ values
            if kind == "weight" and columns is not None:
                narrow = narrow @ columns.T
        return narrow.to(self._state[name].dtype)

    def _axes(self, module: str) -> tuple[Tensor | None, Tensor | None]:
        """What the rows and columns of a module's matrix are multiplied by; None leaves them."""
        match = _ATTENTION_MODULE.match(module)
        if match and match[2] in ("value", *_ATTENTION):
            return self._of_attention(match[1], match[2])
        if match := _PERCEPTRON.match(module):
            return self._of_perceptron(match[1], int(match[2]))
        if module.endswith(("feedforward.inner", "feedforward.outer")):
            base = module.rpartition(".")[0]
            hidden = self._neurons(f"{base}.inner", f"{base}.outer", self._feedforward)
            inner = module.endswith("inner")
            return (hidden, self.stream) if inner else (self.stream, hidden)
        if _COORDINATES.search(module):
            return None, None
        if _READS_STREAM.search(module) or f"{module}.weight" in _TABLES:
            return None, self.stream
        raise UserError(
            f"widths 'principal' does not know what the channels of {module} are: give the student "
            "its width"
        )

    def _of_attention(self, module: str, name: str) -> tuple[Tensor | None, Tensor | None]:
        of_value: tuple[Axis, str] = (("value",), "stream" if "self_" in module else "place")
        blocks, columns = of_value if name == "value" else _ATTENTION[name]
        found = {"stream": self.stream, "place": self.place}
        for kind in {*blocks, columns} - {"stream", "place", "same"}:
            found[kind] = self._per_head(module, kind)
        if blocks == ("same",):
            return None, found[columns]
        return _diagonal([found[block] for block in blocks]), found[columns]

    def _per_head(self, module: str, kind: str) -> Tensor:
        """[w, W]: principal directions of a module's queries and keys or of its values, per head.

        Products of queries and keys are scaled by one over the root of a head's channels.
        """
        parts: list[Tensor] = []
        for name in ("value", *_ATTENTION):
            blocks = ("value",) if name == "value" else _ATTENTION[name][0]
            weight = self._state.get(f"{module}.{name}.weight")
            if weight is not None and kind in blocks:
                pieces = torch.cat([_columns(weight), _bias(self._state, module, name)], 1)
                cut = torch.split(pieces, [self._source] * len(blocks))
                parts += [part for part, block in zip(cut, blocks, strict=True) if block == kind]
        narrow, wide = self._width // self._heads, self._source // self._heads
        per_head = [part.view(self._heads, wide, -1) for part in parts]
        rows = [principal_rows([x[k] for x in per_head], narrow) for k in range(self._heads)]
        scale = (narrow / wide) ** 0.25 if kind == "match" else 1.0
        return scale * _diagonal(rows)

    def _of_perceptron(self, base: str, layer: int) -> tuple[Tensor | None, Tensor | None]:
        depth = sum(f"{base}.layers.{k}.weight" in self._state for k in range(9))
        first, last = self.stream, None
        if base.endswith("query_scale"):
            last = self.place
        elif base == _EMBEDS_ANCHORS:  # it reads a point's encoding and behind it the sides'
            first, last = _diagonal([self.place, self.place]), self.stream

        def hidden(k: int) -> Tensor:
            return self._neurons(f"{base}.layers.{k}", f"{base}.layers.{k + 1}", self._width)

        rows = last if layer == depth - 1 else hidden(layer)
        return rows, first if layer == 0 else hidden(layer - 1)

    def _neurons(self, before: str, behind: str, count: int) -> Tensor:
        """[count, hidden] selection of those that weigh most, by what enters and what leaves."""
        enters, leaves = (self._state[f"{name}.weight"].double() for name in (before, behind))
        use = enters.norm(dim=1) * leaves.norm(dim=0)
        chosen = use.topk(min(count, len(use))).indices.sort().values
        return _identity(len(use))[chosen]


def principal_rows(written: Iterable[Tensor], count: int) -> Tensor:
    """[count, W] orthonormal rows: principal directions, as close to single channels as can be.

    Args:
        written: [W, ..] matrices whose columns are directions; each counts the same.
        count: rows; W gives the identity.
    """
    parts = [x.double() / x.norm().clamp(min=1e-12) for x in written]
    width = parts[0].shape[0]
    if count == width:
        return _identity(width)
    spread = torch.stack([x @ x.T for x in parts]).sum(0)
    basis = torch.linalg.eigh(spread).eigenvectors[:, -count:]
    # Any rotation of the basis spans the same: the one nearest to as many channels that span it.
    pivots = qr(basis.T.numpy(), mode="r", pivoting=True)[1][:count]
    left, _, right = torch.linalg.svd(basis[sorted(int(p) for p in pivots)])
    rows: Tensor = left @ right @ basis.T
    return rows


def nearest_frequencies(wide: int, narrow: int) -> Tensor:
    """[w, W] selection of the channels of a sine encoding whose frequencies are the student's.

    Args:
        wide: W, channels: sines and cosines of W / 4 frequencies of y, then those of x.
        narrow: w.
    """
    own, theirs = narrow // 4, wide // 4
    frequency = (torch.arange(own) * theirs / own).round().long().clamp(max=theirs - 1)
    of_axis = torch.stack([2 * frequency, 2 * frequency + 1], -1).flatten()
    return _identity(wide)[torch.cat([of_axis, of_axis + wide // 2])]


def _writes_stream(name: str) -> bool:
    """Whether the rows of a matrix are channels of the stream."""
    ends = (
        "attention.output.weight",
        "feedforward.outer.weight",
        "norm.bias",
        f"{_EMBEDS_ANCHORS}.layers.1.weight",
    )
    return name.startswith("decoder") and name.endswith(ends)


def _identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """One matrix of blocks along its diagonal."""
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix


def _columns(values: Tensor) -> Tensor:
    values = values.double()
    return values[:, None] if values.dim() == 1 else values


def _bias(state: Mapping[str, Tensor], module: str, name: str) -> Tensor:
    return _columns(state[f"{module}.{name}.bias"])
