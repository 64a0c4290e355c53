"""The teacher once: what it says about an image is kept on the machine's disk and read again.

What is kept are the values themselves, so losses are those without a cache. A record belongs to
the pixels as the teacher sees them, not to an image's name: whichever seed, epoch, trial or
augmentation led there, equal pixels have equal records, and others never do.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d3etr.config.tree import Config
from d3etr.data.loading import EpochLoader
from d3etr.distillation.distiller import Distiller
from d3etr.distillation.teaching import Taught
from d3etr.errors import UserError
from d3etr.storage.cache import clear_cache_errors, open_cache
from d3etr.storage.records import RecordFile, ensure_room, smallest
from d3etr.structures import ImageBatch
from d3etr.training.assembly import Models
from d3etr.training.context import TrainContext
from d3etr.training.optimiser import autocast
from d3etr.training.taught_records import RecordLayout

SETTING = "teacher.cache_gigabytes"
_PROBE = hashlib.sha256(b"probe").digest()
"""Key of what the teacher says about a test picture."""
_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
"""How much of that kernels may change by other rounding."""

Tell = Callable[[str, str], None]
"""Takes a text and its level, ``info`` or ``warning``."""


@dataclass
class Counts:
    """What became of the images that were asked for.

    Attributes:
        read: were in the file.
        computed: were not, so that the teacher ran.
        unkept: of the computed ones, those that found no place.
    """

    read: int = 0
    computed: int = 0
    unkept: int = 0

    def over_all(self, context: TrainContext) -> Counts:
        """The sums over all workers."""
        ours = torch.tensor([self.read, self.computed, self.unkept], device=context.device)
        return Counts(*context.all_reduce(ours).tolist())

    def text(self) -> str:
        """A line for people."""
        asked = max(1, self.read + self.computed)
        text = (
            f"teacher's outputs: {self.read:,} of {asked:,} images ({self.read / asked:.0%}) were "
            f"read from the cache, {self.computed:,} computed"
        )
        return f"{text}, of which {self.unkept:,} found no place in it" if self.unkept else text


class TeacherCache:
    """Reads what the teacher said before, and runs it for the images that are new.

    Args:
        distiller: of a teacher that is not two-stage, without general points.
        layout: of the records.
        file: where they are.
        tell: told once when something cannot be kept.

    Attributes:
        counts: of this process.
    """

    def __init__(
        self, distiller: Distiller, layout: RecordLayout, file: RecordFile, tell: Tell
    ) -> None:
        self._distiller, self._layout, self._file = distiller, layout, file
        self._tell = tell
        self._is_writable = True
        self.counts = Counts()

    def teach(self, images: ImageBatch, host: ImageBatch) -> Taught:
        """What ``Distiller.teach`` returns for these images.

        Args:
            images: B images of the one size, on the teacher's device.
            host: the same on the CPU.
        """
        keys = [_digest(pixels) for pixels in host.pixels]
        records = torch.empty(len(keys), self._layout.record_bytes, dtype=torch.uint8)
        rows = records.numpy()
        new = [i for i, key in enumerate(keys) if not self._file.read(key, rows[i].data)]
        if new:
            records[new] = self._layout.pack(self._ask(images, new))
            for i in new:
                self._keep(keys[i], rows[i])
        self.counts.read += len(keys) - len(new)
        self.counts.computed += len(new)
        return self._distiller.recall(*self._layout.unpack(records.to(images.pixels.device)))

    @property
    def path(self) -> Path:
        """Of the file."""
        return self._file.path

    @property
    def record_bytes(self) -> int:
        """What an image takes."""
        return self._layout.record_bytes

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _ask(self, images: ImageBatch, chosen: list[int]) -> Taught:
        whole = len(chosen) == len(images.pixels)
        taught = self._distiller.teach(images if whole else ImageBatch(images.pixels[chosen]))
        assert taught is not None
        return taught

    def _keep(self, key: bytes, record: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        try:
            if self._is_writable and self._file.write(key, record.data):
                return
            why = f"is full ({SETTING})"
        except OSError as error:
            self._is_writable = False
            why = f"cannot be written any more ({error.strerror or error})"
        if not self.counts.unkept:
            text = f"{self.path} {why}: the teacher runs for images that it lacks"
            self._tell(text, "warning")
        self.counts.unkept += 1


def open_teacher_cache(
    config: Config, models: Models, loader: EpochLoader, context: TrainContext, tell: Tell
) -> TeacherCache | None:
    """The cache that ``teacher.cache_gigabytes`` asks for; None where the teacher never runs.

    Args:
        config: the run.
        models: its distiller's outputs are kept.
        loader: of the training images.
        context: the workers; each opens the file of its machine.
        tell: told what a person should know.

    Raises:
        UserError: there is no such cache for this teacher or these images, or no room for it.
    """
    if config.teacher is None or config.teacher.cache_gigabytes is None:
        return None
    if not models.distiller.needs_teacher_outputs:
        return None
    size = _one_size(models, loader)
    with autocast(config.teacher_precision, context.device):
        probe = _probe(models.distiller, size, context.device)
    layout = RecordLayout.of(probe)
    limit = round(config.teacher.cache_gigabytes * 1e9)
    _ensure_worth_it(layout.record_bytes, limit)
    cache = open_cache()
    path = cache.teacher(_identity(config, models, layout, size, limit, context.device))
    with clear_cache_errors(cache), ExitStack() as opened:
        cache.make()
        ensure_room(cache, path, limit, SETTING)
        file = RecordFile(path, layout.record_bytes, limit)
        opened.callback(file.close)
        _ensure_as_before(file, layout, probe, _TOLERANCES[config.teacher_precision])
        opened.pop_all()
    tell(
        f"teacher's outputs are kept in {path}: {layout.record_bytes / 1e3:,.1f} KB an image, "
        f"up to {file.capacity:,} images",
        "info",
    )
    return TeacherCache(models.distiller, layout, file, tell)


def _one_size(models: Models, loader: EpochLoader) -> tuple[int, int]:
    """(height, width) of every training image.

    Raises:
        UserError: the teacher's outputs do not depend on an image's own pixels alone.
    """
    if models.teacher is not None and models.teacher.config.queries_need_images:
        raise UserError(
            f"{SETTING} cannot keep the queries that a two-stage teacher makes of each image: "
            "leave it out"
        )
    dataset = loader.dataset
    sizes = np.unique(dataset.sizes(0), axis=0)
    if dataset.has_random_sizes or len(sizes) > 1:
        found = "sizes drawn at random" if dataset.has_random_sizes else f"{len(sizes)} sizes"
        raise UserError(
            f"{SETTING} needs training images of one size, as what a teacher says about an image "
            f"depends on the padding that its batch needs; after the transforms they have {found}: "
            "leave it out"
        )
    height, width = sizes[0].tolist()
    return height, width


def _ensure_worth_it(record_bytes: int, limit: int) -> None:
    """Refuse a file for a few images.

    Raises:
        UserError: saying how large it must be.
    """
    needed = smallest(record_bytes)
    if limit < needed:
        raise UserError(
            f"{SETTING}: an image takes {record_bytes / 1e3:,.0f} KB, and {limit / 1e6:,.3g} MB "
            f"hold too few of them: set it to at least {math.ceil(needed / 1e4) / 1e5}, or leave "
            "it out"
        )


def _probe(distiller: Distiller, size: tuple[int, int], device: torch.device) -> Taught:
    """What the teacher says about one picture, always the same."""
    pixels = torch.linspace(-2, 2, 3 * math.prod(size)).view(1, 3, *size)
    taught = distiller.teach(ImageBatch(pixels.to(device)))
    assert taught is not None
    return taught


def _ensure_as_before(
    file: RecordFile, layout: RecordLayout, probe: Taught, tolerance: float
) -> None:
    """Make sure that this program computes what the one that filled the file did.

    Raises:
        UserError: what the teacher says about the test picture is not what it said.
        OSError: the file cannot be read or written.
    """
    now, before = layout.pack(probe), torch.empty(1, layout.record_bytes, dtype=torch.uint8)
    if not file.read(_PROBE, before.numpy()[0].data):
        file.write(_PROBE, now.numpy()[0].data)
        return
    difference = layout.difference(before, now)
    if not difference <= tolerance:
        raise UserError(
            f"{SETTING}: the teacher does not say what it said when {file.path} was filled (about "
            f"a test picture, by {difference:.1g}): another version of the program filled it. "
            "Remove the file"
        )


def _identity(
    config: Config,
    models: Models,
    layout: RecordLayout,
    size: tuple[int, int],
    limit: int,
    device: torch.device,
) -> str:
    """A digest of all that a record depends on beside pixels, and of the file's own size."""
    parts = {
        "torch": str(torch.__version__),
        "device": device.type,
        "teacher": models.digests["teacher.weights"],
        "layers": models.distiller.taught_layers,
        "layout": layout.describe(),
        "size": size,
        "precision": config.teacher_precision,
        "compile": config.optimisation.compile,
        "bytes": limit,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _digest(pixels: Tensor) -> bytes:
    """Of one image [3, height, width]."""
    return hashlib.sha256(pixels.contiguous().numpy().data).digest()
