"""Detectors, methods and data formats by name: built-in ones, and those of installed packages.

The one place that lists them. A name stands for ``module:attribute``, which is imported when it is
first asked for. A package adds its own by an entry point:

    [project.entry-points."d3etr.detectors"]
    my_detr = "my_package.my_detr:MyDETR"
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from functools import cache
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
        self.built_in = tuple(built_in)
        self._own = {name: EntryPoint(name, value, group) for name, value in built_in.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the built-in ones, then of those that installed packages bring."""
        others = {point.name for point in self._points()} - {*self.built_in}
        return (*self.built_in, *sorted(others))

    def find(self, name: str) -> Any:
        """What ``name`` stands for.

        Raises:
            UserError: no such name, two packages bring it, or it cannot be imported.
        """
        own = self._own.get(name)
        # A package that lies twice on the path is listed twice.
        found = {point.value: point for point in self._points() if point.name == name}
        theirs = [*found.values()]
        if own is not None and theirs:
            raise UserError(
                f"{_package(theirs[0])} brings a {self.kind} called '{name}', which is d3etr's "
                f"own: uninstall it until it takes another name in its entry points '{self.group}'"
            )
        if own is not None:
            return own.load()
        if not theirs:
            raise UserError(
                f"there is no {self.kind} '{name}'; {nearest(name, self.names)}. Packages add "
                f"others through entry points '{self.group}'"
            )
        if len(theirs) > 1:
            packages = " and ".join(map(_package, theirs))
            raise UserError(f"{packages} both bring a {self.kind} called '{name}': uninstall one")
        return self._load(theirs[0])

    def _load(self, point: EntryPoint) -> Any:
        try:
            return point.load()
        except Exception as error:  # whatever a stranger's module raises
            raise UserError(
                f"the {self.kind} '{point.name}' cannot be imported from "
                f"{_package(point)}: {type(error).__name__}: {error}"
            ) from error

    def _points(self) -> Iterable[EntryPoint]:
        return _entry_points(self.group, tuple(sys.path))


@cache
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Of the packages on ``path``; looking takes tens of milliseconds."""
    return tuple(entry_points(group=group))


def _package(point: EntryPoint) -> str:
    name = getattr(point.dist, "name", None)
    return f"{point.value} of package {name}" if name else point.value


DETECTORS = Registry(
    "detector",
    "d3etr.detectors",
    {
        "detr": "d3etr.detectors.detr:DETR",
        "conditional_detr": "d3etr.detectors.conditional_detr:ConditionalDETR",
        "dab_detr": "d3etr.detectors.dab_detr:DABDETR",
        "deformable_detr": "d3etr.detectors.deformable_detr:DeformableDETR",
        "rt_detr": "d3etr.detectors.rt_detr:RTDETR",
        "d_fine": "d3etr.detectors.d_fine:DFINE",
        "deimv2": "d3etr.detectors.deimv2:DEIMv2",
        "lw_detr": "d3etr.detectors.lw_detr:LWDETR",
        "rf_detr": "d3etr.detectors.rf_detr:RFDETR",
        "dino": "d3etr.detectors.dino:DINO",
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
        "qskd": "d3etr.methods.qskd:QSKD",
        "feature_cosine": "d3etr.methods.feature_cosine:FeatureCosine",
        "clockdistill": "d3etr.methods.clockdistill:CLoCKDistill",
        "distribution": "d3etr.methods.distribution:Distribution",
        "teach_detr": "d3etr.methods.teach_detr:TeachDETR",
    },
)
"""Classes of ``methods.base.Method``."""

FORMATS = Registry(
    "data format",
    "d3etr.formats",
    {
        "coco": "d3etr.data.formats.coco:CocoFormat",
        "yolo": "d3etr.data.formats.yolo:YoloFormat",
        "voc": "d3etr.data.formats.voc:VocFormat",
        "imagefolder": "d3etr.data.formats.imagefolder:ImageFolderFormat",
    },
)
"""Classes of ``data.annotations.DataFormat``."""

HOOKS = Registry("hook", "d3etr.hooks", {})
"""Classes of ``engine.hooks.Hook``, without arguments."""
