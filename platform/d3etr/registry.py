"""Detectors and methods by name: this package's, and those that installed packages bring.

The one place that lists them. A name stands for ``module:attribute``, which is imported when it is
first asked for. A package adds its own by an entry point:

    [project.entry-points."d3etr.detectors"]
    my_detr = "my_package.my_detr:MyDETR"
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from d3etr.errors import UserError
from d3etr.text import nearest


class Registry:
    """Objects by name, imported when they are asked for.

    Args:
        kind: what they are, for error texts.
        group: of the entry points.
        built_in: name -> ``module:attribute``.
    """

    def __init__(self, kind: str, group: str, built_in: Mapping[str, str]) -> None:
        self.kind, self.group = kind, group
        self._built_in = {name: EntryPoint(name, value, group) for name, value in built_in.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Built-in ones first.

        Raises:
            UserError: two packages bring one name, or a package one of the built-in names.
        """
        return tuple(self._entries)

    def find(self, name: str) -> Any:
        """What ``name`` stands for.

        Raises:
            UserError: no such name, or it cannot be imported.
        """
        if name not in self._entries:
            raise UserError(f"there is no {self.kind} '{name}'; {nearest(name, self.names)}")
        entry = self._entries[name]
        if name in self._built_in:
            return entry.load()
        try:
            return entry.load()
        except Exception as error:  # whatever a stranger's module raises
            raise UserError(
                f"{self.kind} '{name}' of {_package(entry)} cannot be imported from "
                f"{entry.value}: {type(error).__name__}: {error}"
            ) from error

    @cached_property
    def _entries(self) -> dict[str, EntryPoint]:
        importlib.invalidate_caches()
        found = dict(self._built_in)
        for entry in entry_points(group=self.group):
            # One package that lies twice on the path is listed twice.
            if entry.name in found and found[entry.name].value != entry.value:
                first = _package(found[entry.name])
                raise UserError(
                    f"two packages bring a {self.kind} '{entry.name}': {first} and "
                    f"{_package(entry)}. Uninstall one of them, or rename its entry point in "
                    f"group '{self.group}'"
                )
            found[entry.name] = entry
        return found


def _package(entry: EntryPoint) -> str:
    return "d3etr" if entry.dist is None else f"package {entry.dist.name}"


DETECTORS = Registry(
    "detector",
    "d3etr.detectors",
    {
        "detr": "d3etr.detectors.detr:DETR",
        "conditional_detr": "d3etr.detectors.conditional_detr:ConditionalDETR",
        "dab_detr": "d3etr.detectors.dab_detr:DABDETR",
        "deformable_detr": "d3etr.detectors.deformable_detr:DeformableDETR",
    },
)
"""Classes of ``detectors.base.DetectionTransformer``."""

METHODS = Registry(
    "method",
    "d3etr.methods",
    {
        "none": "d3etr.methods.none:NoDistillation",
        "d3etr": "d3etr.methods.d3etr:D3ETR",
        "kd_detr": "d3etr.methods.kd_detr:KDDETR",
        "detrdistill": "d3etr.methods.detrdistill:DETRDistill",
    },
)
"""Classes of ``methods.base.Method``."""
