"""Which output of a class head is which category.

Official detectors are trained with category ids as labels: COCO's 80 categories have ids up to
90, so that a head has 91 outputs (slots), 11 of which no object ever had.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from d3etr.errors import UserError

Categories = tuple[tuple[int, str], ...]
"""(id, name) of each class."""
UNNAMED = "N/A"
"""What Hugging Face's files and torchvision call a slot without a category."""
_COCO = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_SLOTS = len(_COCO)
"""Outputs of detectors that were trained with COCO's ids as labels: 0 to 90."""
COCO: Categories = tuple(
    (number, name) for number, name in enumerate(_COCO) if number and name != UNNAMED
)
"""COCO's 80 categories with the ids of its annotation files."""

_CLASS_HEAD = re.compile(r"(class_head|decoder\.class_heads|proposals\.(\d+\.)?class_head)\.")


def slots_of(
    count: int,
    given: Sequence[tuple[int, str]] | None,
    names: Mapping[Any, Any] | None,
    coco: int = COCO_SLOTS,
) -> tuple[Categories, list[int]]:
    """The categories of a class head, and the slot of each.

    Args:
        count: slots of the class head, without "no object".
        given: (id, name) of each category, by rising id, if the user named them.
        names: Hugging Face's ``id2label``, if there is one.
        coco: slots of this kind's detectors of COCO; one for each category, or one for each id.

    Raises:
        UserError: categories and slots do not go together.
    """
    if given is None and names:
        categories = _named(count, names)
    elif given is None and count == coco:
        categories = COCO
    elif given is None:
        raise UserError(
            f"the class head has {count} outputs, not the {coco} of detectors trained on "
            "COCO: name them with --categories ANNOTATIONS.json, the file that the detector learnt "
            "from"
        )
    else:
        categories = tuple(given)
    if all(0 <= number < count for number, _ in categories):
        return categories, [number for number, _ in categories]
    if len(categories) == count:
        return categories, [*range(count)]
    raise UserError(
        f"--categories names {len(categories)} categories with ids up to {max(categories)[0]}, but "
        f"the class head has {count} outputs: expected ids below {count} (an output for each id) "
        f"or {count} categories. Give the annotation file that the detector learnt from"
    )


def _named(count: int, names: Mapping[Any, Any]) -> Categories:
    named = sorted((int(slot), str(name)) for slot, name in names.items() if str(slot).isdigit())
    if [slot for slot, _ in named] != list(range(count)):
        raise UserError(
            f"id2label names {len(named)} outputs, but the class head has {count}: correct "
            "config.json, or give --categories ANNOTATIONS.json"
        )
    return tuple((slot, name) for slot, name in named if name != UNNAMED)


def choose_rows(
    tensors: dict[str, Tensor],
    used: Sequence[int],
    count: int,
    softmax: bool,
    proposals_tell_classes: bool = False,
) -> int:
    """Bring the outputs of every class head into the order of the categories.

    Args:
        tensors: by our names; changed in place.
        used: slot of each category.
        count: slots of the class head, without "no object".
        softmax: unused slots stay in it, behind the classes, and "no object" stays last.
        proposals_tell_classes: else the first stage's slot 0 stands for "some object".

    Returns:
        Number of unused slots.
    """
    unused = [slot for slot in range(count) if slot not in used]
    rows = [*used, *unused, count] if softmax else [*used]
    for name in tensors:
        if _CLASS_HEAD.match(name):
            # The first stage's slot 0 stands for "some object", whatever category has it.
            first = name.startswith("proposals.") and not proposals_tell_classes
            order = [0, *rows[1:]] if first else rows
            tensors[name] = tensors[name][torch.tensor(order)]
        elif name.startswith("label_embedding."):  # its last row stands for no class
            tensors[name] = tensors[name][torch.tensor([*rows, count])]
    return len(unused)
