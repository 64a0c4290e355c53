"""Which output of a class head is which category.

Official detectors are trained with category ids as labels: COCO's 80 categories have ids up to
90, so that a head has 91 outputs (slots), 11 of which no object ever had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d3etr.detectors.imports import coco
from d3etr.errors import UserError

Categories = tuple[tuple[int, str], ...]
"""(id, name) of each class."""
UNNAMED = "N/A"
"""What Hugging Face's files call a slot without a category."""


@dataclass(frozen=True)
class Slots:
    """What is taken from a class head.

    Attributes:
        categories: C of them, in the order that their logits will have.
        used: the slot of each.
        unused: slots that belong to no category.
    """

    categories: Categories
    used: tuple[int, ...]
    unused: tuple[int, ...]


def slots_of(
    count: int, given: Sequence[tuple[int, str]] | None, names: Mapping[Any, Any] | None
) -> Slots:
    """Find the category of each slot.

    Args:
        count: slots of the class head, without "no object".
        given: (id, name) of each category, by rising id, if the user named them.
        names: Hugging Face's ``id2label``, if there is one.

    Raises:
        UserError: categories and slots do not go together.
    """
    if given is not None:
        return _given(count, given)
    if names:
        return _named(count, names)
    if count == coco.SLOTS:
        return _by_id(count, coco.CATEGORIES)
    raise UserError(
        f"the class head has {count} outputs, not the {coco.SLOTS} of detectors trained on COCO: "
        "name them with --categories ANNOTATIONS.json, the file that the detector learnt from"
    )


def _given(count: int, given: Sequence[tuple[int, str]]) -> Slots:
    if all(0 <= number < count for number, _ in given):
        return _by_id(count, tuple(given))
    if len(given) == count:
        return Slots(tuple(given), tuple(range(count)), ())
    raise UserError(
        f"--categories names {len(given)} categories with ids up to {max(given)[0]}, but the "
        f"class head has {count} outputs: expected ids below {count} (an output for each id) or "
        f"{count} categories. Give the annotation file that the detector learnt from"
    )


def _named(count: int, names: Mapping[Any, Any]) -> Slots:
    named = sorted((int(slot), str(name)) for slot, name in names.items() if str(slot).isdigit())
    if [slot for slot, _ in named] != list(range(count)):
        raise UserError(
            f"id2label names {len(named)} outputs, but the class head has {count}: correct "
            "config.json, or give --categories ANNOTATIONS.json"
        )
    return _by_id(count, tuple((slot, name) for slot, name in named if name != UNNAMED))


def _by_id(count: int, categories: Categories) -> Slots:
    used = tuple(number for number, _ in categories)
    return Slots(categories, used, tuple(slot for slot in range(count) if slot not in used))


def choose_rows(tensors: dict[str, Tensor], slots: Slots, exclusive: bool) -> None:
    """Bring the outputs of every class head into the order of the categories.

    Args:
        tensors: by our names; changed in place.
        slots: what to take.
        exclusive: a softmax's head: unused slots stay in it, behind the classes, and "no object"
            stays last.
    """
    rows = [*slots.used]
    if exclusive:
        rows += [*slots.unused, len(slots.used) + len(slots.unused)]
    for name in [name for name in tensors if is_class_head(name)]:
        # The first stage's slot 0 stands for "some object", whatever category has it.
        order = [0, *rows[1:]] if name.startswith("proposals.") else rows
        tensors[name] = tensors[name][torch.tensor(order)]


def is_class_head(name: str) -> bool:
    """Whether a tensor of ours has an output for each class."""
    return name.startswith(("class_head.", "decoder.class_heads.", "proposals.class_head."))
