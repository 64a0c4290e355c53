"""Valid data that is hardly meant so: what exporters and cameras get wrong.

Shares are chosen so that sound data sets give no warning: single odd
boxes are in all of them.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d3etr.data.splits import DetectionSplit

Boxes = NDArray[np.float64]

_ROUNDING = 2.0
"""Pixels by which a box may reach over its image's edge without a word."""
_EXPECTED = 15
"""A class that should have had so many boxes in validation and has none is no coincidence."""
_BACKGROUND = {"background", "bg", "void", "unlabeled", "unlabelled", "none", "nothing"}
_LEAST_PATTERN = 8
"""Smaller images may be of one colour."""
_DARK = 16
"""No pixel brighter than that, of 255: twelve bits stored in sixteen."""
_ODDITIES = {
    "flat": "are of one colour, as a camera or converter that failed writes them",
    "dark": "have no pixel above 6 % of the range: 12-bit pixels in a 16-bit file must be scaled "
    "to all 16 bits",
    "transparent": "have transparent pixels: transparency is ignored, and what lies under it is "
    "seen",
}

# How the four numbers may have been meant, as [x, y, width, height].
_MEANINGS: dict[str, Callable[[Boxes], Boxes]] = {
    "[x1, y1, x2, y2]": lambda b: np.c_[b[:, :2], b[:, 2:] - b[:, :2]],
    "[y1, x1, y2, x2]": lambda b: np.c_[b[:, [1, 0]], b[:, [3, 2]] - b[:, [1, 0]]],
    "[centre x, centre y, width, height]": lambda b: np.c_[b[:, :2] - b[:, 2:] / 2, b[:, 2:]],
    "[y, x, height, width]": lambda b: b[:, [1, 0, 3, 2]],
    "[x, y, height, width]": lambda b: b[:, [0, 1, 3, 2]],
}


@dataclass(frozen=True)
class _Table:
    """All boxes of a split that count, [n] or [n, 4] each.

    Attributes:
        xywh: as annotated, pixels.
        sizes: [n, 2] width and height of the image.
        images: the image's id.
        labels: class index.
        areas: as evaluation takes them.
    """

    xywh: Boxes
    sizes: Boxes
    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.xywh)

    def example(self, odd: NDArray[np.bool_]) -> str:
        """The first odd box, as an example."""
        first = int(np.flatnonzero(odd)[0])
        box = ", ".join(f"{side:g}" for side in self.xywh[first])
        width, height = self.sizes[first]
        return f"image id {self.images[first]}, {width:g} x {height:g}: [{box}]"


def box_warnings(split: DetectionSplit) -> list[str]:
    """What is odd about a split's boxes: a sentence each, with counts and an example."""
    table = _table(split)
    if not len(table):
        return []
    found = [_meaning(table, len(split.cleaning.outside))]
    found += [check(table) for check in _CHECKS]
    return [text for text in found if text]


def class_warnings(splits: Mapping[str, DetectionSplit]) -> list[str]:
    """What is odd about the classes of the splits and how boxes are spread over them."""
    if not splits:
        return []
    categories = next(iter(splits.values())).categories
    return _similar_names([c.name for c in categories]) + _absent_classes(splits)


def _table(split: DetectionSplit) -> _Table:
    rows = [(record, ~record.crowd) for record in split.records]
    counts = [int(single.sum()) for _, single in rows]
    sizes = np.array([(record.width, record.height) for record, _ in rows], dtype=np.float64)
    return _Table(
        xywh=np.concatenate([record.boxes_xywh[single] for record, single in rows]),
        sizes=np.repeat(sizes, counts, axis=0),
        images=np.repeat(np.array([record.id for record, _ in rows], dtype=np.int64), counts),
        labels=np.concatenate([record.labels[single] for record, single in rows]),
        areas=np.concatenate([record.areas[single] for record, single in rows]),
    )


def _inside(xywh: Boxes, sizes: Boxes, slack: float) -> NDArray[np.bool_]:
    """[n] boxes with a size that lie within their images, but for ``slack`` pixels."""
    low, high = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    fits = (xywh[:, 2:] > 0) & (low >= -slack) & (high <= sizes + slack)
    return fits[:, 0] & fits[:, 1]


def _meaning(table: _Table, dropped: int) -> str | None:
    """Boxes that reach out of their images, and what they would be to lie within."""
    inside = _inside(table.xywh, table.sizes, _ROUNDING)
    reaching, boxes = int((~inside).sum()) + dropped, len(table) + dropped
    if inside.all() or reaching < 0.03 * boxes:
        return None
    shares = {
        meaning: float(_inside(convert(table.xywh), table.sizes, _ROUNDING).mean())
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
    return (
        f"{reaching} of {boxes} boxes reach out of their image ({table.example(~inside)}); {advice}"
    )


def _normalised(table: _Table) -> str | None:
    high = (table.xywh[:, :2] + table.xywh[:, 2:]).max(1)
    odd = (high <= 1.0) & (table.sizes.min(1) >= 8)
    if odd.mean() < 0.5:
        return None
    return (
        f"{int(odd.sum())} of {len(table)} boxes lie within the first pixel ({table.example(odd)}):"
        " they look like fractions of the image; write pixels"
    )


def _shrunk(table: _Table) -> str | None:
    """Boxes in pixels of a smaller image crowd together in the upper left corner."""
    low = (table.xywh[:, :2] / table.sizes).min(0)
    high = ((table.xywh[:, :2] + table.xywh[:, 2:]) / table.sizes).max(0)
    pixels = (table.xywh[:, :2] + table.xywh[:, 2:]).max()
    few = len(table) < 20 or len(np.unique(table.images)) < 5
    if few or pixels <= 1 or (high > 0.7).any() or (low > 0.1 * high).any():
        return None
    return (
        f"no box reaches beyond {high[0]:.0%} of its image's width and {high[1]:.0%} of its height "
        f"({table.example(np.ones(len(table), dtype=bool))}): they may be in pixels of a smaller "
        "image, or in percent"
    )


def _whole(table: _Table) -> str | None:
    whole = table.xywh[:, 2:] >= 0.99 * table.sizes
    odd = whole[:, 0] & whole[:, 1]
    if odd.mean() < 0.3:
        return None
    return (
        f"{int(odd.sum())} of {len(table)} boxes are their whole image ({table.example(odd)}): "
        "there is nothing to locate"
    )


def _repeated(table: _Table) -> str | None:
    """The same box twice in an image."""
    key = np.c_[table.images, table.labels, table.xywh.view(np.int64)]
    _, first, counts = np.unique(key, axis=0, return_index=True, return_counts=True)
    again = int((counts - 1).sum())
    if again < max(1, 0.01 * len(table)):
        return None
    odd = np.zeros(len(table), dtype=bool)
    odd[first[counts > 1]] = True
    return (
        f"{again} of {len(table)} boxes repeat another of the same class and image "
        f"({table.example(odd)}): each counts as an object of its own; annotate it once"
    )


def _placeholder(table: _Table) -> str | None:
    """The same box in image after image."""
    partial = table.xywh[(table.xywh[:, 2:] < 0.99 * table.sizes).any(1)]
    if len(partial) < 20:
        return None
    boxes, counts = np.unique(partial, axis=0, return_counts=True)
    if counts.max() < 0.3 * len(table):
        return None
    box = ", ".join(f"{side:g}" for side in boxes[counts.argmax()])
    return (
        f"{counts.max()} of {len(table)} boxes are all [{box}]: it may stand for boxes that an "
        "exporter did not have"
    )


def _tiny(table: _Table) -> str | None:
    high = (table.xywh[:, :2] + table.xywh[:, 2:]).max(1)
    odd = (table.xywh[:, 2:].max(1) < 2) & (high > 1) & (table.sizes.min(1) >= 8)
    if odd.mean() < 0.05:
        return None
    return (
        f"{int(odd.sum())} of {len(table)} boxes are smaller than 2 x 2 pixels "
        f"({table.example(odd)}): too small to be seen, if they are meant in pixels"
    )


def _areas(table: _Table) -> str | None:
    share = table.areas / np.prod(table.xywh[:, 2:], axis=1)
    if len(table) < 10 or np.median(share) > 0.02:
        return None
    odd = share <= np.median(share)
    return (
        f"half of all boxes have an 'area' under {np.median(share):.2%} of width x height "
        f"({table.example(odd)}): evaluation sorts objects small, medium and large by it; write "
        "square pixels, or leave it out"
    )


_CHECKS = (_normalised, _shrunk, _whole, _repeated, _placeholder, _tiny, _areas)


def _similar_names(names: list[str]) -> list[str]:
    """Names that only spelling tells apart, and classes that are none."""
    groups: dict[str, list[str]] = {}
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold()
        groups.setdefault("".join(filter(str.isalnum, plain)).removesuffix("s"), []).append(name)
    similar = [group for key, group in groups.items() if key and len(group) > 1]
    found = [
        f"categories {', '.join(map(repr, group))} differ in spelling alone: they are learnt as "
        "different classes"
        for group in similar
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
    if "train" not in splits:
        return []
    learnt = _boxes_of_classes(splits["train"])
    found = []
    for name in splits.keys() - {"train"}:
        measured = _boxes_of_classes(splits[name])
        if len(measured) != len(learnt) or not (measured.sum() and learnt.sum()):
            continue
        odd = np.flatnonzero(
            (measured == 0) & (learnt * (measured.sum() / learnt.sum()) > _EXPECTED)
        )
        if len(odd):
            names = [splits["train"].categories[k].name for k in odd.tolist()]
            found.append(
                f"{name} has no box of {', '.join(names)}, train has {int(learnt[odd].sum())}: "
                "whether these are learnt will not be known; divide the images at random"
            )
    return found


def _boxes_of_classes(split: DetectionSplit) -> NDArray[np.int64]:
    labels = np.concatenate([record.labels[~record.crowd] for record in split.records])
    return np.bincount(labels, minlength=len(split.categories))


def pixel_oddity(image: Image.Image, pixels: Image.Image) -> str:
    """What is odd about an image, or nothing: a key that ``pixel_warnings`` explains.

    Args:
        image: as stored.
        pixels: what a detector gets, RGB.
    """
    values = np.asarray(pixels)
    if min(pixels.size) >= _LEAST_PATTERN and bool((values == values[0, 0]).all()):
        return "flat"
    if image.mode[0] == "I" and values.max() < _DARK:
        return "dark"
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if has_alpha and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        return "transparent"
    return ""


def pixel_warnings(
    found: Iterable[tuple[int, str]], shown_images: Callable[[list[int]], str]
) -> list[str]:
    """A sentence for each oddity.

    Args:
        found: image ids, and their ``pixel_oddity``.
        shown_images: text of image ids.
    """
    ids: dict[str, list[int]] = defaultdict(list)
    for number, oddity in found:
        ids[oddity].append(number)
    return [
        f"{len(numbers)} images {_ODDITIES[oddity]} ({shown_images(numbers)})"
        for oddity, numbers in ids.items()
    ]
