"""Detectors of others, recognised and renamed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from d3etr.config.data import PreprocessingConfig
from d3etr.detectors.imports import hugging_face, official, reading, settings
from d3etr.detectors.imports.architecture import Unseen
from d3etr.detectors.imports.categories import Categories
from d3etr.detectors.imports.reading import Found
from d3etr.errors import UserError

UNSEEN = ("heads", "dilation", "temperature")
"""What of ``Said`` stands in for a checkpoint's missing ``args``."""


@dataclass(frozen=True)
class Said:
    """What the user says about weights that do not say it themselves; None: nothing.

    Attributes:
        heads: attention heads H.
        dilation: whether the backbone's last stage is dilated (DC5).
        temperature: of DAB-DETR's position encoding.
        categories: (id, name) of each category, by rising id.
    """

    heads: int | None = None
    dilation: bool | None = None
    temperature: float | None = None
    categories: Categories | None = None

    def refuse(self, source: Path, why: str, *options: str) -> None:
        """Refuse options that would have no effect.

        Args:
            source: what is imported.
            why: they would have none.
            options: names of attributes.

        Raises:
            UserError: one of them is set.
        """
        given = [f"--{name}" for name in options if getattr(self, name) is not None]
        if given:
            names = " and ".join(given)
            raise UserError(f"{source}: {names} would have no effect: {why}. Leave it out")


@dataclass(frozen=True)
class TheirDetector:
    """A detector of others under our names.

    Attributes:
        kind: what it was, for people.
        name: our name of the detector.
        tensors: by our names; class heads as they were.
        unseen: what tensors do not show.
        names: category names by output, if the source has them.
        preprocessing: what images go through.
        files: where it was read from.
    """

    kind: str
    name: str
    tensors: dict[str, Tensor]
    unseen: Unseen
    names: Mapping[Any, Any] | None
    preprocessing: PreprocessingConfig
    files: tuple[Path, ...]


def from_folder(source: Path, said: Said) -> TheirDetector:
    """A folder of Hugging Face's.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    found = reading.read_folder(source)
    config = found.settings
    name, unseen = settings.from_config(config, f"{source}: {reading.CONFIG}")
    said.refuse(source, f"{reading.CONFIG} says it", *UNSEEN)
    try:
        tensors = hugging_face.from_hugging_face(
            found.tensors, name, box_refinement=bool(config.get("with_box_refine"))
        )
    except ValueError as error:
        raise UserError(f"{source}: {error}: copy it again") from error
    return TheirDetector(
        kind=f"Hugging Face's {config['model_type']}",
        name=name,
        tensors=tensors,
        unseen=unseen,
        names=config.get("id2label"),
        preprocessing=settings.preprocessing_of(
            found.preprocessing, f"{source}: {reading.PREPROCESSING}"
        ),
        files=found.files,
    )


def from_checkpoint(source: Path, found: Found, said: Said) -> TheirDetector | None:
    """An official checkpoint; None if ``found`` is something else.

    Raises:
        UserError: a variant that we have not.
    """
    name = official.official_detector(found.tensors)
    if name is None:
        return None
    if name != "dab_detr":
        said.refuse(source, f"{name} has no such setting", "temperature")
    unseen = _with_said(source, settings.from_args(found.settings, str(source)), said)
    _require_certainty(source, name, unseen)
    try:
        tensors = official.from_official(found.tensors, name)
    except ValueError as error:
        raise UserError(f"{source}: {error}: copy it again") from error
    return TheirDetector(
        kind=f"an official checkpoint of {name}",
        name=name,
        tensors=tensors,
        unseen=unseen,
        names=None,
        preprocessing=PreprocessingConfig(),
        files=found.files,
    )


def _with_said(source: Path, unseen: Unseen, said: Said) -> Unseen:
    values = {name: getattr(said, name) for name in UNSEEN}
    for key, value in values.items():
        theirs = getattr(unseen, key)
        if None not in (value, theirs) and value != theirs:
            raise UserError(f"{source}: its args say {key} {theirs}, but --{key} says {value}")
    changes = {key: value for key, value in values.items() if value is not None}
    return unseen.model_copy(update=changes)


def _require_certainty(source: Path, name: str, unseen: Unseen) -> None:
    """Ask where a default would be a guess that spoils every detection."""
    if unseen.dilation is None and "dc5" in source.name.lower():
        raise UserError(
            f"{source}: named like a detector with dilation (DC5), which weights do not show: say "
            "--dilation or --no-dilation"
        )
    if name == "dab_detr" and unseen.dilation and unseen.temperature is None:
        raise UserError(
            f"{source}: the temperature of a dilated DAB-DETR's position encoding is 20, or 10 "
            "(official R50-DC5), which weights do not show: say --temperature 20 or 10"
        )
