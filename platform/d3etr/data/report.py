"""What a check of a data set found, for people and for machines."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from d3etr.data.records import shown_ids

_SHOWN_MESSAGES = 10
_LINE_LENGTH = 100
_INDENT = 21


@dataclass(frozen=True)
class SplitReport:
    """What one split holds and what is odd about it; ids are the annotation file's.

    Attributes:
        name: train, validation or test.
        images_folder: where its images are.
        annotations: the file or folder of its annotations.
        format: of the annotations; empty where they could not be read.
        digest: sha256 of its content.
        images: number of images.
        boxes: number of boxes that count as objects: not dropped, no crowds.
        boxes_per_category: category name -> number of such boxes.
        object_sizes: COCO's small (under 32^2 square pixels), medium (to 96^2), large -> boxes.
        box_sides: lowest, median and highest of sqrt(width * height), pixels of the original.
        image_sizes: "width x height" -> images, most frequent first.
        modes: pixel format (RGB, L, CMYK, ...) -> images.
        zero_size: annotations dropped because width or height is not above 0.
        outside: annotations dropped because they lie outside of their image.
        clipped: annotations clipped to their image for training.
        crowd: crowd annotations, ignored in training and evaluation.
        implausible_area: annotations whose ``area`` cannot be their box's.
        foreign_flag: annotations that count, though other formats' flags would ignore them.
        without_objects: images without any object; they are kept.
        rotated: images turned upright by their EXIF data.
        rotation_ignored: images whose EXIF rotation contradicts the annotations.
        missing: images without a file.
        unreadable: image -> why it cannot be decoded.
        wrong_size: image -> its size and the annotated one.
        repeated_files: file name -> the images that name it.
        errors: why training or evaluation would fail.
        warnings: what may be wrong.
    """

    name: str
    images_folder: str
    annotations: str
    format: str = ""
    digest: str = ""
    images: int = 0
    boxes: int = 0
    boxes_per_category: dict[str, int] = field(default_factory=dict)
    object_sizes: dict[str, int] = field(default_factory=dict)
    box_sides: dict[str, float] = field(default_factory=dict)
    image_sizes: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    zero_size: tuple[int, ...] = ()
    outside: tuple[int, ...] = ()
    clipped: tuple[int, ...] = ()
    crowd: tuple[int, ...] = ()
    implausible_area: tuple[int, ...] = ()
    foreign_flag: tuple[int, ...] = ()
    without_objects: tuple[int, ...] = ()
    rotated: tuple[int, ...] = ()
    rotation_ignored: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    unreadable: dict[int, str] = field(default_factory=dict)
    wrong_size: dict[int, str] = field(default_factory=dict)
    repeated_files: dict[str, tuple[int, ...]] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def text(self) -> str:
        """Several lines for people."""
        lines = [
            f"{self.name}: {self.images} images, {self.boxes} boxes",
            f"  images             {self.images_folder}",
            f"  annotations        {self.annotations}"
            + (f" ({self.format})" if self.format else ""),
        ]
        facts = {
            "boxes by category": _counts(self.boxes_per_category, len(self.boxes_per_category)),
            "boxes by size": _counts(self.object_sizes),
            "box side, pixels": ", ".join(f"{k} {v:g}" for k, v in self.box_sides.items()),
            "image sizes": _counts(self.image_sizes),
            "pixel formats": _counts(self.modes),
            "dropped, zero size": _ids(self.zero_size, "annotation"),
            "dropped, outside": _ids(self.outside, "annotation"),
            "clipped to image": _ids(self.clipped, "annotation"),
            "crowds, ignored": _ids(self.crowd, "annotation"),
            "without objects": _ids(self.without_objects, "image"),
            "rotated by EXIF": _ids(self.rotated, "image"),
            "EXIF not applied": _ids(self.rotation_ignored, "image"),
        }
        lines += [_wrapped(f"  {name:<19}{fact}") for name, fact in facts.items() if fact]
        lines += [f"  {line}" for line in _messages("warning", self.warnings)]
        lines += [f"  {line}" for line in _messages("ERROR", self.errors)]
        return "\n".join(lines)


@dataclass(frozen=True)
class DataReport:
    """What all configured splits hold.

    Attributes:
        splits: one report each.
        errors: what is wrong between splits.
        warnings: what is odd between splits.
    """

    splits: tuple[SplitReport, ...]
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """False when training or evaluation would fail."""
        return not self.errors and not any(split.errors for split in self.splits)

    def text(self) -> str:
        """The whole report for people."""
        parts = [split.text() for split in self.splits]
        between = _messages("warning", self.warnings) + _messages("ERROR", self.errors)
        if between:
            parts.append("\n".join(between))
        parts.append("ready to train" if self.ok else "training would fail: see ERROR above")
        return "\n\n".join(parts)

    def to_json(self) -> str:
        """The whole report as a JSON object, every id listed."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=1)


def _messages(kind: str, texts: Sequence[str]) -> list[str]:
    lines = [f"{kind}: {text}" for text in texts[:_SHOWN_MESSAGES]]
    if len(texts) > _SHOWN_MESSAGES:
        lines.append(f"{kind}: and {len(texts) - _SHOWN_MESSAGES} more (--json lists them all)")
    return lines


def _wrapped(line: str) -> str:
    return textwrap.fill(
        line, _LINE_LENGTH, subsequent_indent=" " * _INDENT, break_long_words=False
    )


def _counts(counts: Mapping[str, int], shown: int = 6) -> str:
    texts = [f"{name} {count}" for name, count in counts.items()]
    more = [f"and {len(texts) - shown} more"] if len(texts) > shown else []
    return ", ".join(texts[:shown] + more)


def _ids(ids: tuple[int, ...], kind: str) -> str:
    return f"{len(ids)} ({kind} ids {shown_ids(ids)})" if ids else ""
