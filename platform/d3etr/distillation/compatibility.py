"""Whether a teacher can teach a student, decided before anything runs."""

from __future__ import annotations

from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import DistillationConfig
from d3etr.distillation.layers import teacher_layers
from d3etr.errors import UserError


def check_compatible(
    student: DetectorConfig, teacher: DetectorConfig, distillation: DistillationConfig
) -> None:
    """Refuse a pair that a configured loss cannot bridge.

    Different widths are bridged by an adapter, different depths by the layer map, different
    strides by resizing the teacher's cross-attention, different kinds of references by a learned
    map; different head counts only by averaging, different numbers of feature levels by nothing.

    Raises:
        UserError: names the losses and the settings that would help.
    """
    teacher_layers(distillation.layer_map, student.decoder_layers, teacher.decoder_layers)
    _check_levels(student, teacher, distillation)
    if student.heads == teacher.heads:
        return
    terms = {"self": distillation.self_attention, "cross": distillation.cross_attention}
    blocked = [
        f"distillation.{kind}_attention"
        for kind, term in terms.items()
        if term.weight and term.heads == "apart"
    ]
    if blocked:
        raise UserError(
            f"{' and '.join(blocked)} compare attention head by head, but the student has "
            f"{student.heads} heads and the teacher {teacher.heads}: set heads to 'averaged' "
            "there, set weight to 0, or give the student the teacher's number of heads"
        )


def _check_levels(
    student: DetectorConfig, teacher: DetectorConfig, distillation: DistillationConfig
) -> None:
    if not distillation.cross_attention.weight:
        return
    ours, theirs = student.feature_levels, teacher.feature_levels
    if ours != theirs:
        raise UserError(
            "distillation.cross_attention compares maps level by level, but the student "
            f"({student.name}) has {ours} feature level{'s' * (ours > 1)} and the teacher "
            f"({teacher.name}) {theirs}: set distillation.cross_attention.weight to 0, or give "
            "both as many levels"
        )
