"""A traced detector as PyTorch's own file (``torch.export``), which runs without d3etr."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from d3etr.errors import UserError
from d3etr.exports.comparison import Detected
from d3etr.exports.description import Description
from d3etr.exports.formats import Runner
from d3etr.exports.graph import Traced

METADATA = "d3etr.json"
"""Name of the description among the extra files."""


class TorchExportFormat:
    """A ``.pt2`` file, compared in this PyTorch."""

    name = "torch-export"
    packages: tuple[str, ...] = ()
    few_by_gathers = False
    opset: int | None = None

    def write(self, traced: Traced, description: Description, path: Path) -> None:
        """As of ``GraphFormat``."""
        extra = {METADATA: json.dumps(description.as_metadata())}
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            # PyTorch warns about constants that are views of others, which it stores well.
            warnings.simplefilter("ignore", UserWarning)
            torch.export.save(traced.program, buffer, extra_files=extra)
        path.write_bytes(buffer.getvalue())

    def open(self, path: Path) -> Runner:
        """As of ``GraphFormat``."""
        return load_torch_export(path)[1]


def load_torch_export(path: Path) -> tuple[Description, Runner]:
    """Open a ``.pt2`` file of ``d3etr export`` on the CPU.

    Raises:
        UserError: the file is missing, damaged or not d3etr's.
    """
    extra = {METADATA: ""}
    try:
        module = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra).module()
    except Exception as error:  # PyTorch has errors of many types
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: PyTorch cannot read it ({first}). Expected a .pt2 file of d3etr export: copy "
            "it again, or export it again"
        ) from error

    @torch.no_grad()
    def run(images: Any, sizes: Any) -> Detected:
        found = module(torch.from_numpy(images), torch.from_numpy(sizes))
        return Detected(*(part.numpy() for part in found))

    metadata = json.loads(extra[METADATA] or "{}")
    return Description.from_metadata(metadata, str(path)), run
