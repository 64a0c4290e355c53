"""Which teacher layer teaches which student layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from d3etr.errors import UserError

LayerMap = Literal["uniform", "last"] | Sequence[int]


def teacher_layers(mapping: LayerMap, student: int, teacher: int) -> list[int]:
    """Teacher layer index for each student layer; equal depths map layer to layer.

    Args:
        mapping: ``uniform`` spreads the teacher's layers, ``last`` lets its last layer teach
            all, a sequence names them. The last layer always teaches the last.
        student: decoder layers of the student.
        teacher: decoder layers of the teacher.

    Raises:
        UserError: an explicit mapping has another length, names a layer that is not there, or
            does not end with the last.
    """
    if mapping == "last":
        return [teacher - 1] * student
    if isinstance(mapping, str):
        # Rounded up: ends with teacher - 1, and is the identity at equal depths.
        return [-((layer + 1) * teacher // -student) - 1 for layer in range(student)]
    layers = list(mapping)
    if len(layers) != student or max(layers) >= teacher or layers[-1] != teacher - 1:
        raise UserError(
            f"distillation.layer_map is {layers}: expected {student} entries (one per student "
            f"decoder layer), each below {teacher} (the teacher's decoder layers), the last "
            f"being {teacher - 1}"
        )
    return layers
