"""Whether a teacher can teach a student, decided before anything runs."""

from __future__ import annotations

from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import DistillationConfig
from d3etr.distillation.correspondence import kept_pairs
from d3etr.distillation.layers import teacher_layers
from d3etr.distillation.teaching import group_size
from d3etr.errors import UserError


def check_compatible(
    student: DetectorConfig,
    teacher: DetectorConfig,
    distillation: DistillationConfig,
    classes: int,
) -> None:
    """Refuse a pair that a configured loss cannot bridge, or over which it would always be 0.

    Different widths are bridged by an adapter, different depths by the layer map, different
    strides by resizing what the teacher says about tokens, different kinds of references by a
    learned map; different head counts only by averaging. Different numbers of feature levels are
    bridged for features, not for cross-attention.

    Args:
        student: its architecture.
        teacher: its architecture.
        distillation: what is distilled over which pairs.
        classes: C, of both.

    Raises:
        UserError: names the losses and the settings that would help.
    """
    teacher_layers(distillation.layer_map, student.decoder_layers, teacher.decoder_layers)
    _check_levels(student, teacher, distillation)
    _check_heads(student, teacher, distillation)
    _check_classes(distillation, classes)
    _check_lone_queries(student, teacher, distillation)


def _check_heads(
    student: DetectorConfig, teacher: DetectorConfig, distillation: DistillationConfig
) -> None:
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


def _check_classes(distillation: DistillationConfig, classes: int) -> None:
    """A softmax over one class is 1 whatever the logit."""
    prediction = distillation.prediction
    if classes > 1 or not (prediction.weight and prediction.class_weight):
        return
    if prediction.class_loss == "kl":
        raise UserError(
            "distillation.prediction.class_loss 'kl' compares a softmax over the classes, and the "
            "data has one class: the loss would always be 0. Set "
            "distillation.prediction.class_loss to 'bce' or 'focal' and "
            "distillation.prediction.temperature to 1"
        )


def _check_lone_queries(
    student: DetectorConfig, teacher: DetectorConfig, distillation: DistillationConfig
) -> None:
    """The attention of a query to itself alone is 1 whatever the weights."""
    if not distillation.self_attention.weight:
        return
    lone = {
        "matched_pair_ratio": distillation.matches_adaptively
        and kept_pairs(student.queries, teacher.queries, distillation.matched_pair_ratio) == 1,
        "teacher_query_ratio": distillation.adaptive_ratio < 1
        and group_size(teacher.queries, distillation.teacher_query_ratio) == 1,
        "general_points.count": distillation.general_points.count == 1,
    }
    found = [f"distillation.{key}" for key, alone in lone.items() if alone]
    if found:
        raise UserError(
            "distillation.self_attention compares how queries attend to each other, but of "
            f"{student.queries} student and {teacher.queries} teacher queries "
            f"{' and '.join(found)} {'leave' if len(found) > 1 else 'leaves'} one: the loss would "
            "always be 0. Raise that, or the detectors' queries, or set "
            "distillation.self_attention.weight to 0"
        )
