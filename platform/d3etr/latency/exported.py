"""Exported files as contenders, each in its own runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from d3etr.errors import UserError
from d3etr.exports.description import Description
from d3etr.exports.inputs import as_taken, prepared
from d3etr.exports.onnx_predictor import load_onnx
from d3etr.exports.openvino_runtime import load_openvino
from d3etr.exports.torch_export import load_torch_export
from d3etr.latency.contenders import Action, Contender, Way

RUNTIMES = {".onnx": "ONNX Runtime", ".xml": "OpenVINO", ".pt2": "torch.export"}
"""By the file's suffix."""


@dataclass(frozen=True)
class ExportContender(Contender):
    """An exported file.

    Attributes:
        description: of the file.
        runtime: its name.
        run: detects in the arrays that the file's graph takes.
    """

    description: Description = field(kw_only=True)
    runtime: str = field(kw_only=True)
    run: Callable[[Any, Any], object] = field(kw_only=True)

    @classmethod
    def read(
        cls, name: str, file: Path, picture: Image.Image, device: torch.device, threads: int
    ) -> ExportContender:
        """From a file whose suffix is one of ``RUNTIMES``.

        Raises:
            UserError: it cannot be read, or does not run on the device.
        """
        suffix = file.suffix.lower()
        run: Callable[[Any, Any], object]
        if suffix == ".onnx":
            predictor = load_onnx(file, str(device), threads)
            about, run = predictor.description, predictor.run
        else:
            if device.type != "cpu":
                raise UserError(
                    f"{file}: {RUNTIMES[suffix]} files are run on the CPU only, and this is "
                    f"{device}: give --device cpu, or leave the file out"
                )
            about, run = (
                load_openvino(file, threads) if suffix == ".xml" else load_torch_export(file)
            )
        height, width = prepared(about, picture).shape[1:]
        return cls(
            name,
            (height, width),
            about.evaluation,
            file_bytes=_bytes(file),
            description=about,
            runtime=RUNTIMES[suffix],
            run=run,
        )

    def action(self, picture: Image.Image, way: Way) -> Action | None:
        """In the numbers that the file has."""
        if way.compiled or way.precision != "float32":
            return None
        pixels = [prepared(self.description, picture)] * way.batch
        # Stacked, they lie in memory as they were decoded, and each run would reorder them.
        images = np.ascontiguousarray(np.stack(pixels))
        sizes = np.array([(picture.height, picture.width)] * way.batch, dtype=np.int64)
        return lambda: self.run(as_taken(self.description, images), sizes)

    def run_as(self, way: Way) -> str:
        """The runtime, and the file's numbers."""
        return f"{self.runtime} {(self.description.quantisation or {}).get('kind', way.precision)}"


def _bytes(file: Path) -> int:
    """Of the file, and of the weights beside OpenVINO's."""
    files = {file, file.with_suffix(".bin")} if file.suffix.lower() == ".xml" else {file}
    return sum(each.stat().st_size for each in files if each.is_file())
