"""Valid data that is hardly meant so: what exporters and cameras get wrong.

Shares are chosen so that sound data sets give no warning: single odd boxes are in all of them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from d3etr.data.records import Objects
from d3etr.data.splits import DetectionSplit

Boxes = NDArray[np.float64]

_ROUNDING = 2.0
"""Pixels by which a box may reach over its image's edge without a word."""
_EXPECTED = 15
"""A class that should have had so many boxes in validation and has none is no coincidence."""
_BACKGROUND = {"background", "bg", "void", "unlabeled", "unlabelled", "none", "nothing"}

# How the four numbers may have been meant, as [x, y, width, height].
_MEANINGS: dict[str, Callable[[Boxes], Boxes]] = {
    "[x1, y1, x2, y2]": lambda b: np.c_[b[:, :2], b[:, 2:] - b[:, :2]],
    "[y1, x1, y2, x2]": lambda b: np.c_[b[:, [1, 0]], b[:, [3, 2]] - b[:, [1, 0]]],
    "[centre x, centre y, width, height]": lambda b: np.c_[b[:, :2] - b[:, 2:] / 2, b[:, 2:]],
    "[y, x, height, width]": lambda b: b[:, [1, 0, 3, 2]],
    "[x, y, height, width]": lambda b: b[:, [0, 1, 3, 2]],
}


def box_warnings(split: DetectionSplit) -> list[str]:
    """What is odd about a split's boxes: a sentence each, with counts and an example."""
    objects = split.objects
    if not len(objects.labels):
        return []
    found = [
        _meaning(split, len(split.cleaning["outside"])),
        _fractions(split),
        _shrunk(split),
        _repeated(split),
    ]
    return [text for text in found if text]


def class_warnings(splits: Mapping[str, DetectionSplit]) -> list[str]:
    """What is odd about the classes of the splits and how boxes are spread over them."""
    if not splits:
        return []
    names = [category.name for category in next(iter(splits.values())).categories]
    return _similar_names(names) + _absent_classes(splits)


def _example(split: DetectionSplit, odd: NDArray[np.bool_]) -> str:
    """The first odd box."""
    first = int(np.flatnonzero(odd)[0])
    box = ", ".join(f"{side:g}" for side in split.objects.boxes_xywh[first])
    record = split.records[split.objects.images[first]]
    return f"{split.shown_images([record])}, {record.width} x {record.height}: [{box}]"


def _inside(xywh: Boxes, sizes: Boxes) -> NDArray[np.bool_]:
    """[n] boxes with a size that lie within their images, but for rounding."""
    low, high = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    fits = (xywh[:, 2:] > 0) & (low >= -_ROUNDING) & (high <= sizes + _ROUNDING)
    return fits[:, 0] & fits[:, 1]


def _far_corners(objects: Objects) -> Boxes:
    return objects.boxes_xywh[:, :2] + objects.boxes_xywh[:, 2:]


def _meaning(split: DetectionSplit, dropped: int) -> str | None:
    """Boxes that reach out of their images, and what they would be to lie within."""
    objects = split.objects
    inside = _inside(objects.boxes_xywh, objects.sizes)
    reaching, boxes = int((~inside).sum()) + dropped, len(inside) + dropped
    if inside.all() or reaching < 0.03 * boxes:
        return None
    shares = {
        meaning: float(_inside(convert(objects.boxes_xywh), objects.sizes).mean())
        for meaning, convert in _MEANINGS.items()
    }
    best = max(shares, key=lambda meaning: shares[meaning])
    if shares[best] >= 0.99:
        advice = (
            f"read as {best} {shares[best]:.0%} of them fit: write [x, y, width, height], x and "
            "y of the upper left corner"
        )
    elif reaching < 0.2 * boxes:
        return None
    else:
        advice = "they may be in pixels of a larger image, or of an image before it was cropped"
    example = _example(split, ~inside)
    return f"{reaching} of {boxes} boxes reach out of their image ({example}); {advice}"


def _fractions(split: DetectionSplit) -> str | None:
    objects = split.objects
    odd = (_far_corners(objects).max(1) <= 1.0) & (objects.sizes.min(1) >= 8)
    if odd.mean() < 0.5:
        return None
    return (
        f"{int(odd.sum())} of {len(odd)} boxes lie within the first pixel "
        f"({_example(split, odd)}): they look like fractions of the image; write pixels"
    )


def _shrunk(split: DetectionSplit) -> str | None:
    """Boxes in pixels of a smaller image crowd together in the upper left corner."""
    objects = split.objects
    corners = _far_corners(objects)
    low = (objects.boxes_xywh[:, :2] / objects.sizes).min(0)
    high = (corners / objects.sizes).max(0)
    few = len(corners) < 20 or len(np.unique(objects.images)) < 5
    if few or corners.max() <= 1 or (high > 0.7).any() or (low > 0.1 * high).any():
        return None
    return (
        f"no box reaches beyond {high[0]:.0%} of its image's width and {high[1]:.0%} of its height "
        f"({_example(split, np.ones(len(corners), dtype=bool))}): they may be in pixels of a "
        "smaller image, or in percent"
    )


def _repeated(split: DetectionSplit) -> str | None:
    """The same box twice in an image."""
    objects = split.objects
    key = np.c_[objects.images, objects.labels, objects.boxes_xywh.view(np.int64)]
    _, first, counts = np.unique(key, axis=0, return_index=True, return_counts=True)
    again = int((counts - 1).sum())
    if again < max(1, 0.01 * len(key)):
        return None
    odd = np.zeros(len(key), dtype=bool)
    odd[first[counts > 1]] = True
    return (
        f"{again} of {len(key)} boxes repeat another of the same class and image "
        f"({_example(split, odd)}): each counts as an object of its own; annotate it once"
    )


def _similar_names(names: list[str]) -> list[str]:
    """Names that only spelling tells apart, and classes that are none."""
    groups: dict[str, list[str]] = {}
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold()
        groups.setdefault("".join(filter(str.isalnum, plain)).removesuffix("s"), []).append(name)
    found = [
        f"categories {', '.join(map(repr, group))} differ in spelling alone: they are learnt as "
        "different classes"
        for key, group in groups.items()
        if key and len(group) > 1
    ]
    background = [name for name in names if name.strip("_ ").casefold() in _BACKGROUND]
    if background:
        found.append(
            f"category {background[0]!r} looks like no object: detectors need no class for the "
            "background; take it out"
        )
    return found


def _absent_classes(splits: Mapping[str, DetectionSplit]) -> list[str]:
    """Classes that are learnt and, against all odds, never measured."""
    counts = {
        name: np.bincount(split.objects.labels, minlength=len(split.categories))
        for name, split in splits.items()
    }
    learnt = counts.pop("train", np.zeros(0, dtype=np.int64))
    found = []
    for name, measured in counts.items():
        if len(measured) != len(learnt) or not (measured.sum() and learnt.sum()):
            continue
        expected = learnt * (measured.sum() / learnt.sum())
        odd = np.flatnonzero((measured == 0) & (expected > _EXPECTED))
        if len(odd):
            names = [splits["train"].categories[k].name for k in odd.tolist()]
            found.append(
                f"{name} has no box of {', '.join(names)}, train has {int(learnt[odd].sum())}: "
                "whether these are learnt will not be known; divide the images at random"
            )
    return found
