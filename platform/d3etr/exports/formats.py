"""What writes a detector's graph, and what runs it again to compare."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from d3etr.errors import UserError

if TYPE_CHECKING:
    from d3etr.exports.comparison import Detected
    from d3etr.exports.description import Description
    from d3etr.exports.graph import Traced

Runner = Callable[[Any, Any], "Detected"]
"""Detects in images [B, 3, h, w] and sizes [B, 2], both NumPy arrays."""


class GraphFormat(Protocol):
    """A kind of file.

    Attributes:
        name: as ``d3etr export --format`` has it.
        packages: that must be installed.
        few_by_gathers: whether its runtime reads the few values of a decoder's queries faster by
            gathers; the many of an encoder's tokens none does (docs/deploy.md).
        opset: of ONNX, or None.
    """

    name: str
    packages: tuple[str, ...]
    few_by_gathers: bool
    opset: int | None

    def write(self, traced: Traced, description: Description, path: Path) -> None:
        """Write the file, or a folder of files, to a place where nothing is."""
        ...

    def open(self, path: Path) -> Runner:
        """What detects with the written file, on the CPU."""
        ...


def require_package(name: str, format_name: str) -> ModuleType:
    """An installed package.

    Raises:
        UserError: it is missing.
    """
    try:
        return import_module(name)
    except ImportError as error:
        extra = "openvino" if format_name == "openvino" else "onnx"
        raise UserError(
            f"{format_name} needs the package {name}, which is not installed here: pip install "
            f"'d3etr[{extra}]'"
        ) from error
