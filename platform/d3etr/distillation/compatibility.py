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
    strides by resizing the teacher's cross-attention; different head counts only by averaging.

    Raises:
        UserError: names the losses and the settings that would help.
    """
    teacher_layers(distillation.layer_map, student.decoder_layers, teacher.decoder_layers)
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
