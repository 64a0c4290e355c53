"""Teacher outputs that were stored for a few augmentations ("views") of every training image.

A shard is one view of consecutive images: a safetensors file whose tensors have a row for each
image. Rows of ``RAGGED`` tensors run over an image's memory tokens; ``ends`` says where each ends.

Shapes: B images · V feature levels · S tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor

from d3etr.data.view_grids import batch_tokens, moved_locations, moved_tokens
from d3etr.errors import UserError
from d3etr.files import DamagedFileError, atomic_write
from d3etr.structures import Levels, StoredOutputs

Arrays = Mapping[str, NDArray[np.generic]]

RAGGED = frozenset({"cross_key", "cross_scores"})
"""Tensors with a row for each memory token of an image."""
MOVED = {"cross_locations": moved_locations, "place": moved_tokens}
"""Tensors that are relative to an image's grids, and what makes them relative to others."""
ENDS, GRIDS = "ends", "grids"
"""[images] int64, tokens up to the end of each image; [images, V, 2] int32, its grids."""
OPEN_SHARDS = 256
"""Files that a process keeps open: systems allow about a thousand."""
_DIGEST = "sha256"
_TYPES = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "I64": np.int64}


@lru_cache(maxsize=4096)
def _orders(seed: int, round_: int, index: int, count: int) -> tuple[int, ...]:
    return tuple(Random(f"views/{seed}/{round_}/{index}").sample(range(count), count))


@dataclass(frozen=True)
class TeacherViews:
    """A complete store, read at random; loading processes open its files themselves.

    Attributes:
        folder: of the store.
        count: K, views of each image.
        seed: of the views' augmentation.
        order: seed of the order in which they are shown.
        shard_images: images of a shard; the last one of a view may have fewer.
        strides: pixels per cell of each of the teacher's levels; none where nothing is on them.
    """

    folder: Path
    count: int
    seed: int
    order: int
    shard_images: int
    strides: tuple[int, ...] = ()

    def view(self, number: int, index: int) -> int:
        """Which view of image ``index`` a pass over the images shows: in every K passes, each once.

        Args:
            number: of the pass, from 0: the epoch, or of images without labels their own.
            index: of the image.
        """
        round_, place = divmod(number, self.count)
        return _orders(self.order, round_, index, self.count)[place]

    def record(self, index: int, number: int) -> Arrays:
        """What the teacher said about image ``index`` in the view that pass ``number`` shows.

        Raises:
            UserError: a shard is gone or damaged.
        """
        shard_number, row = divmod(index, self.shard_images)
        shard = open_shard(shard_path(self.folder, self.view(number, index), shard_number))
        start, end = 0, 0
        if ENDS in shard:
            start, end = int(shard[ENDS][row - 1]) if row else 0, int(shard[ENDS][row])
        return {
            name: values[start:end] if name in RAGGED else values[row]
            for name, values in shard.items()
            if name != ENDS
        }


def batch_records(
    records: Sequence[Arrays], strides: Sequence[int], size: tuple[int, int]
) -> StoredOutputs:
    """What the teacher said about a batch.

    Args:
        records: of B images.
        strides: see ``TeacherViews``.
        size: (height, width) in pixels that the batch is padded to.
    """
    levels = tuple((-(-size[0] // step), -(-size[1] // step)) for step in strides)
    own = [tuple((h, w) for h, w in record[GRIDS].tolist()) for record in records if strides]
    values = {}
    for name in records[0]:
        if name == GRIDS:
            continue
        parts = [record[name] for record in records]
        if name in RAGGED:
            values[name] = torch.from_numpy(batch_tokens(parts, own, levels))
            continue
        if name in MOVED:
            move = MOVED[name]
            parts = [move(part, one, levels) for part, one in zip(parts, own, strict=True)]
        values[name] = torch.from_numpy(np.stack(parts))
    if strides:
        values["hidden"] = _outside(own, levels)
    return StoredOutputs(values, levels)


def shard_path(folder: Path, view: int, number: int) -> Path:
    """The file of shard ``number`` of a view."""
    return folder / f"view-{view:03d}-{number:05d}.safetensors"


def view_shards(folder: Path, view: int) -> list[Path]:
    """The shards of a view that are there."""
    return sorted(folder.glob(f"view-{view:03d}-*.safetensors"))


def write_shard(path: Path, rows: Sequence[Arrays]) -> None:
    """Write images' records, whole or not at all.

    Args:
        path: of the shard.
        rows: of each image, tensors by name; those of ``RAGGED`` begin with a dimension of tokens.

    Raises:
        UserError: no space left.
    """
    together = {
        # Contiguous: safetensors would write the memory of any other as it lies.
        name: np.ascontiguousarray(join([row[name] for row in rows]))
        for name in rows[0]
        for join in (np.concatenate if name in RAGGED else np.stack,)
    }
    ragged = RAGGED.intersection(together)
    if ragged:
        name = min(ragged)
        together[ENDS] = np.cumsum([len(row[name]) for row in rows], dtype=np.int64)
    try:
        with atomic_write(path) as temporary:
            save_file(together, temporary, {_DIGEST: _digest(together)})
            temporary.chmod(0o644)  # the library writes for the owner only; storage is shared
    except SafetensorError as error:
        raise UserError(
            f"cannot write {path} ({error}): free some space, or name another teacher.views.folder"
        ) from error


@lru_cache(maxsize=OPEN_SHARDS)
def open_shard(path: Path) -> Arrays:
    """The tensors of a shard; their content is read where it is looked at.

    Raises:
        UserError: it is gone, or is no such file.
    """
    return _mapped(path)[0]


def verify_shard(path: Path) -> None:
    """Read a shard whole and compare it with the digest in it.

    Raises:
        UserError: it is gone or damaged.
    """
    tensors, digest = _mapped(path)
    if _digest(tensors) != digest:
        raise _damaged(path, "its content is not what was written")


def _mapped(path: Path) -> tuple[Arrays, object]:
    """The tensors of a shard and the digest in it."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        content = np.memmap(path, mode="r", offset=8 + length)
        digest = header.pop("__metadata__")[_DIGEST]
        return {name: _tensor(content, about) for name, about in header.items()}, digest
    except FileNotFoundError as error:
        raise UserError(
            f"{path}, a part of the stored teacher views, is gone: run the same command again, "
            "which makes it"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error


def _tensor(content: NDArray[np.uint8], about: dict[str, Any]) -> NDArray[np.generic]:
    begin, end = about["data_offsets"]
    values = content[begin:end].view(_TYPES[about["dtype"]])
    return values.reshape(about["shape"])


def _damaged(path: Path, why: str) -> DamagedFileError:
    return DamagedFileError(
        f"{path}, a part of the stored teacher views, is damaged ({why}): remove that file and run "
        "the same command again, which makes it anew"
    )


def _digest(tensors: Arrays) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        found.update(np.ascontiguousarray(tensors[name]).data)
    return found.hexdigest()


def _outside(own: Sequence[Levels], levels: Levels) -> Tensor:
    """[B, S] bool: cells of a batch's levels that are outside of an image's own."""
    inside = [np.ones(sum(h * w for h, w in grids), dtype=bool) for grids in own]
    return torch.from_numpy(~batch_tokens(inside, own, levels))
