"""Which part of a data set is which split, by what the parts are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from d3etr.errors import UserError

NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}
"""Split -> what data sets call it."""
BOTH = "train and validation"
"""A part that is not divided yet, such as Pascal VOC's ``trainval``."""
_BOTH_NAMES = tuple(f"{one}{other}" for one in NAMES["train"] for other in NAMES["validation"])
_KNOWN = {*_BOTH_NAMES, *(name for names in NAMES.values() for name in names)}
_DETECTION = "instances_"
"""What COCO's own files of boxes begin with, beside those of key points and captions."""
_SHOWN = 8


def split_of(text: str) -> str | None:
    """The split, or ``BOTH``, that words of a name say; None where they say none, or several."""
    text = text.lower()
    for mark in "-_.0123456789":
        text = text.replace(mark, " ")
    words = {*text.split()}
    called = [split for split, names in NAMES.items() if not words.isdisjoint(names)]
    if not words.isdisjoint(_BOTH_NAMES) or called == ["train", "validation"]:
        return BOTH
    return called[0] if len(called) == 1 else None


def splits_among(data: Path, parts: Mapping[str, str | None], what: str) -> dict[str, str]:
    """The part that is each split; without validation, the training part is still to be divided.

    Args:
        data: the data set.
        parts: name -> its split, as ``split_of`` says; one or more.
        what: the parts are, for texts.

    Returns:
        Split -> name of the part. One part alone is the training part, whatever its name.

    Raises:
        UserError: names do not tell which part is which.
    """
    if len(parts) == 1:
        return {"train": next(iter(parts))}
    found = dict[str, str]()
    for split in (*NAMES, BOTH):
        names = [name for name, called in parts.items() if called == split]
        if names:
            found[split] = _one(data, split, names, what)
    both = found.pop(BOTH, None)
    if both is not None and not {"train", "validation"} <= {*found}:
        found = {"train": both} | {name: found[name] for name in ("test",) if name in found}
    elif "train" not in found or ("validation" not in found and None in parts.values()):
        raise UserError(
            f"{data}: found the {what} {_listed([*parts])}; expected one, or names that say which "
            "is 'train' and which 'val' (or 'trainval', which is divided): rename them"
        )
    return found


def unused(parts: Mapping[str, str | None], splits: Mapping[str, str]) -> list[str]:
    """A sentence on parts that are no split, nor the union of two; none where there are none.

    Args:
        parts: as in ``splits_among``.
        splits: what that gave.
    """
    united = {BOTH} if "validation" in splits else set[str]()
    left = [n for n, called in parts.items() if n not in splits.values() and called not in united]
    if not left:
        return []
    used = ", ".join(f"{name} ({split})" for split, name in splits.items())
    return [f"the data set has parts that are not used: {_listed(left)}; used are {used}"]


def _one(data: Path, split: str, names: Sequence[str], what: str) -> str:
    """The part that is called just so, or else COCO's own file of boxes, where several are.

    Raises:
        UserError: names do not tell.
    """
    stems = {name: PurePath(name).stem.lower() for name in names}
    plain = [name for name, stem in stems.items() if stem in _KNOWN]
    boxes = [name for name, stem in stems.items() if stem.startswith(_DETECTION)]
    best = plain or boxes or names
    if len(best) > 1:
        raise UserError(
            f"{data}: found several {what} of the {split} split ({_listed(best)}); expected one: "
            "rename or move away the others"
        )
    return best[0]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
