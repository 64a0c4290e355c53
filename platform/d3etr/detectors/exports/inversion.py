"""An import backwards: tensors of ours where the import would have taken them from.

Every number of the others' tensors gets an id. The import of these ids shows where each number ends
up here, however tensors are renamed, split, stacked or reordered; our numbers go back by the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from d3etr.detectors.imports.layouts import UNUSED, Agree
from d3etr.errors import UserError

Import = Callable[[Mapping[str, Tensor], Agree], Mapping[str, Tensor]]
"""Tensors of ours from those of others; where two of theirs should be copies of each other, the
second argument is asked, and the second of the two is kept."""
_SHOWN = 6


def invert(
    theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], take: Import
) -> dict[str, Tensor]:
    """The tensors that an import makes ours of.

    Args:
        theirs: give names and shapes, on any device.
        ours: by our names, of one type but for counters.
        take: the import; it may move numbers, not calculate with them.

    Returns:
        By their names, in ``ours``' type. Tensors that the import does not look at are left out
        (``UNUSED``: they say nothing, or what settings say).

    Raises:
        UserError: the import of ``theirs`` would not give exactly ``ours``.
    """
    ids, count = _number(theirs)
    copies: list[tuple[Tensor, Tensor]] = []

    def note(dropped: Tensor, kept: Tensor) -> bool:
        copies.append((dropped, kept))
        return True

    places = take(ids, note)
    ours = {name: tensor for name, tensor in ours.items() if not name.endswith(UNUSED)}
    _ensure_same(places, ours)
    values = torch.zeros(count, dtype=next(iter(ours.values())).dtype)
    filled = torch.zeros(count, dtype=torch.bool)
    for name, place in places.items():
        values[place.flatten()] = ours[name].detach().flatten()
        filled[place.flatten()] = True
    for dropped, kept in reversed(copies):  # what was kept first may have been dropped later
        values[dropped.flatten()] = values[kept.flatten()]
        filled[dropped.flatten()] = filled[kept.flatten()]
    whole = {name: bool(filled[place].all()) for name, place in ids.items()}
    empty = [name for name, full in whole.items() if not full and not name.endswith(UNUSED)]
    if empty:
        raise UserError(f"nothing here fills their tensors {_listed(empty)}: {_HINT}")
    return {name: values[place] for name, place in ids.items() if whole[name]}


_HINT = (
    "this detector has another architecture than theirs, so that the two would detect something "
    "else; it can't be exported"
)


def _number(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Ids in the shapes of tensors, and how many there are."""
    ids, count = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel()
        ids[name] = torch.arange(count, count + size).view(tensor.shape)
        count += size
    return ids, count


def _ensure_same(places: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    shapes = [{name: x.shape for name, x in part.items()} for part in (places, ours)]
    differing = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
    if differing:
        raise UserError(
            f"theirs and ours do not have the same tensors or shapes: {_listed(differing)}: {_HINT}"
        )


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
