"""What an exported file says about itself; neither PyTorch nor pydantic is needed to read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from d3etr.errors import UserError

VERSION = "1"
"""Of the graph's inputs, outputs and metadata; a reader refuses others."""
PREFIX = "d3etr."
INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "labels")
Quantisation = Literal["int8-dynamic", "int8-static", "float16"]
"""Smaller numbers that an ONNX file can be in."""


@dataclass(frozen=True)
class ImageSettings:
    """What an image goes through, as of ``config.data.PreprocessingConfig``.

    Attributes:
        normalisation: imagenet, per_image or unit.
        shortest_side: pixels, or None: images keep their size.
        longest_side: upper bound in pixels, or None.
        exact_size: (height, width) in pixels, or None.
    """

    normalisation: str
    shortest_side: int | None
    longest_side: int | None
    exact_size: tuple[int, int] | None


@dataclass(frozen=True)
class Description:
    """Metadata of an exported detector.

    Attributes:
        detector: its kind.
        names: of the C classes, in the order of ``labels``.
        category_ids: of the annotation file, likewise.
        preprocessing: of images, before the graph where it is not ``inside``.
        inside: whether the graph normalises: it takes uint8 RGB pixels then, else float32.
        size: (height, width) in pixels that the graph takes, or None: any from ``smallest`` on.
        smallest: shortest side of an image in pixels.
        detections: K, of each image at most.
        threshold: lowest score of a detection where nobody says another; the graph gives all.
        sampling: how values at sampled places are read: grid-sample, gather, or none.
        opset: of ONNX; None for other formats.
        exporter: versions that the file was written with, by package.
        evaluation: of the weights that the graph was compared with: split, data digest, mAP, as far
            as they are known and hold for the file. Of a quantised file the mAP is its own, where
            it was measured.
        quantisation: None, or ``kind`` and what it cost (docs/deploy.md).
    """

    detector: str
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    preprocessing: ImageSettings
    inside: bool
    size: tuple[int, int] | None
    smallest: int
    detections: int
    threshold: float
    sampling: str
    opset: int | None
    exporter: Mapping[str, str]
    evaluation: Mapping[str, Any]
    quantisation: Mapping[str, Any] | None = None

    def as_metadata(self) -> dict[str, str]:
        """JSON by name, as files of other formats store it."""
        values = {"version": VERSION, **asdict(self)}
        return {f"{PREFIX}{key}": json.dumps(value) for key, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], source: str) -> Description:
        """Of what ``as_metadata`` returned.

        Args:
            metadata: of a file, others' keys too.
            source: the file, for error texts.

        Raises:
            UserError: no file of ``d3etr export``, or one of another version.
        """
        own = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
        if "version" not in own:
            raise UserError(
                f"{source}: its metadata has no '{PREFIX}version': expected a file that d3etr "
                "export wrote"
            )
        try:
            values = {key: json.loads(value) for key, value in own.items()}
            version = values.pop("version")
            if version == VERSION:
                return _from_values(values)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{source}: its metadata of d3etr is broken ({error}): export it again"
            ) from error
        raise UserError(
            f"{source}: an export of version {version}, but this d3etr reads version {VERSION}: "
            "export it again, or use the d3etr that wrote it"
        )


METADATA_KEYS = tuple(
    f"{PREFIX}{name}" for name in ("version", *(x.name for x in fields(Description)))
)
"""Of the metadata that a file may have."""


def _from_values(values: dict[str, Any]) -> Description:
    images = dict(values.pop("preprocessing"))
    images["exact_size"] = _pair(images["exact_size"])
    found = Description(
        names=tuple(map(str, values.pop("names"))),
        category_ids=tuple(map(int, values.pop("category_ids"))),
        preprocessing=ImageSettings(**images),
        size=_pair(values.pop("size")),
        **values,
    )
    if len(found.names) != len(found.category_ids):
        raise ValueError("it has other numbers of names than of category_ids")
    return found


def _pair(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    height, width = value
    return int(height), int(width)
