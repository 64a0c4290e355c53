"""Whether a teacher can teach a student, decided before anything runs."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.build import build_detector
from d3etr.errors import UserError
from d3etr.methods.adaptive import kept_pairs
from d3etr.methods.denoising_points import check_denoising
from d3etr.methods.encoder_selection import check_selection
from d3etr.methods.refinement import check_refinement
from d3etr.methods.selection import share_of, teacher_layers

if TYPE_CHECKING:
    from d3etr.methods.pairs import LevelPairs
    from d3etr.methods.teacher_query_config import TeacherQueryConfig


def check_pair(
    config: TeacherQueryConfig, student: DetectorConfig, teacher: DetectorConfig, classes: int
) -> None:
    """Refuse detectors that a configured loss cannot bridge, or over which it would always be 0.

    Different widths are bridged by an adapter, different depths by the layer map, different
    strides by resizing the teacher's maps, different kinds of references by a learned map;
    different head counts only by averaging. Different feature levels are bridged for features,
    and for cross-attention by their strides or by merging them.

    Args:
        config: what is compared over pairs.
        student: its architecture.
        teacher: its architecture.
        classes: C, of both.

    Raises:
        UserError: names the losses and the settings that would help.
    """
    layers = teacher_layers(config.layer_map, student.decoder_layers, teacher.decoder_layers)
    if config.refine_teacher:
        check_refinement(layers, teacher)
    _check_content(student, teacher, config)
    _check_levels(student, teacher, config)
    _check_heads(student, teacher, config)
    _check_samples(student, teacher, config)
    _check_classes(config, classes)
    if config.inherited_share:
        _check_inherited(student, teacher)
    if config.denoising_weight:
        check_denoising(student, teacher)
    if config.selects is not None:
        check_selection(student, teacher)
    if config.self_attention.weight:
        counts = student.queries, teacher.queries
        points, kept = config.points, config.kept_share
        alone = {
            "matched_pair_ratio": config.matches_adaptively and kept_pairs(*counts, kept) == 1,
            "teacher_query_ratio": config.fixed_share > 0
            and share_of(counts[1], config.teacher_query_ratio) == 1,
            "inherited_ratio": config.inherited_share > 0 and counts[1] == 1,
            "general_points.count": points is not None and points.count == 1,
        }
        _check_lone_queries(*counts, [key for key, one in alone.items() if one])


def _check_inherited(student: DetectorConfig, teacher: DetectorConfig) -> None:
    """Query i is the same query where it was taken over; of two stages, where its place is."""
    ours, theirs = _says(student), _says(teacher)
    if ours != theirs:
        what = "of one place" if student.queries_need_images else "by their number"
        raise UserError(
            f"distillation.inherited_ratio pairs queries {what}, but the student ({ours}) and the "
            f"teacher ({theirs}) differ: set it to 0, or give the student the teacher's"
        )
    if student.queries_need_images:
        strides = [strides_of(detector) for detector in (student, teacher)]
        if strides[0] != strides[1]:
            raise UserError(
                "distillation.inherited_ratio pairs queries of one place, but the student's "
                f"feature levels have strides {list(strides[0])} and the teacher's "
                f"{list(strides[1])} pixels: set it to 0, or give both backbones of the same "
                "strides"
            )


def shared_levels(student: DetectorConfig, teacher: DetectorConfig) -> LevelPairs | None:
    """Numbers of the student's and the teacher's feature levels of the same stride.

    None: levels correspond by their number, as there is one each, or their strides are the same.
    """
    if student.feature_levels == teacher.feature_levels == 1:
        return None
    ours, theirs = strides_of(student), strides_of(teacher)
    if ours == theirs:
        return None
    return tuple((ours.index(stride), theirs.index(stride)) for stride in ours if stride in theirs)


def strides_of(detector: DetectorConfig) -> tuple[int, ...]:
    """Pixels per cell of each of a detector's feature levels, finest first."""
    with torch.device("meta"):  # no memory, no weights
        return build_detector(detector, 1).level_strides


def _says(detector: DetectorConfig) -> str:
    """What has to be alike where queries were inherited."""
    if detector.queries_need_images:
        return f"{detector.name}, queries of each image, feature levels: {detector.feature_levels}"
    return f"{detector.name}, {detector.queries} queries"


def _check_content(
    student: DetectorConfig, teacher: DetectorConfig, config: TeacherQueryConfig
) -> None:
    """A content that the student does not make itself, or that the teacher does not have."""
    content = config.auxiliary_group.content
    if content == "own" and student.auxiliary_content != "own":
        raise UserError(
            "distillation.auxiliary_group.content 'own' is for students whose queries are tokens "
            f"of their encoder, such as 'rt_detr', not for '{student.name}': set it to "
            f"'{student.auxiliary_content}'"
        )
    if content == "learned" and not student.learns_content:
        raise UserError(
            "distillation.auxiliary_group.content 'learned' is for students whose queries have "
            f"learned contents, such as 'rf_detr', not for '{student.name}': set it to "
            f"'{student.auxiliary_content}'"
        )
    if content == "adapted" and not (student.takes_content and teacher.takes_content):
        raise UserError(
            "distillation.auxiliary_group.content 'adapted' has no effect: queries of the student "
            f"({student.name}) or of the teacher ({teacher.name}) have no content. Remove it"
        )


def _check_heads(
    student: DetectorConfig, teacher: DetectorConfig, config: TeacherQueryConfig
) -> None:
    terms = {
        "self": (config.self_attention, student.heads, teacher.heads),
        "cross": (
            config.cross_attention,
            student.cross_attention_heads,
            teacher.cross_attention_heads,
        ),
    }
    blocked = {
        f"distillation.{kind}_attention": (ours, theirs)
        for kind, (term, ours, theirs) in terms.items()
        if term.weight and term.heads == "per_head" and ours != theirs
    }
    if blocked:
        ours, theirs = (
            " and ".join(map(str, dict.fromkeys(counts)))
            for counts in zip(*blocked.values(), strict=True)
        )
        raise UserError(
            f"{' and '.join(blocked)} compare attention head by head, but the student has "
            f"{ours} heads and the teacher {theirs}: set heads to 'mean' "
            "there, set weight to 0, or give the student the teacher's number of heads"
        )


def _check_samples(
    student: DetectorConfig, teacher: DetectorConfig, config: TeacherQueryConfig
) -> None:
    """Distances of sampled points need some; point by point, as many on both sides."""
    term = config.cross_attention
    if term.detach_queries and student.sampling_parts:
        raise UserError(
            "distillation.cross_attention.detach_queries leaves nothing to learn from: what the "
            f"student ({student.name}) samples, and its weights, are the queries' alone. Set it to "
            "false"
        )
    if not term.weight or term.distance not in ("energy", "points"):
        return
    dense = [
        f"the {whose} ({detector.name})"
        for whose, detector in {"student": student, "teacher": teacher}.items()
        if not detector.sampling_parts
    ]
    if dense:
        raise UserError(
            f"distillation.cross_attention.distance '{term.distance}' compares sampled points, but "
            f"{' and '.join(dense)} attends to the whole memory: set it to 'kl', or use "
            "'deformable_detr', 'rt_detr', 'd_fine', 'deimv2', 'lw_detr' or 'rf_detr'"
        )
    counts = [getattr(detector, "points", None) for detector in (student, teacher)]
    if term.distance == "points" and counts[0] != counts[1]:
        raise UserError(
            "distillation.cross_attention.distance 'points' compares point by point, but the "
            f"student samples {counts[0]} on each level and the teacher {counts[1]}: set it to "
            "'energy', or give both as many points"
        )


def _check_levels(
    student: DetectorConfig, teacher: DetectorConfig, config: TeacherQueryConfig
) -> None:
    """Maps need levels that correspond; what is left out is said."""
    term = config.cross_attention
    if not term.weight or term.distance == "energy" or term.levels == "merged":
        return
    shared = shared_levels(student, teacher)
    if shared is None:
        return
    strides = f"{list(strides_of(student))} pixels and the teacher's {list(strides_of(teacher))}"
    if term.distance == "points":
        raise UserError(
            "distillation.cross_attention.distance 'points' compares point by point, but the "
            f"student's feature levels have strides {strides}: set it to 'energy'"
        )
    if not shared:
        raise UserError(
            "distillation.cross_attention compares maps of levels of the same stride, but the "
            f"student's ({student.name}) have {strides} ({teacher.name}): set "
            "distillation.cross_attention.levels to 'merged', or "
            "distillation.cross_attention.weight to 0"
        )
    kept = [strides_of(student)[own] for own, _ in shared]
    warnings.warn(
        f"distillation.cross_attention compares feature levels of strides {kept} only: the "
        f"student's have {strides}",
        stacklevel=2,
    )


def _check_classes(config: TeacherQueryConfig, classes: int) -> None:
    """A softmax over one class is 1 whatever the logit."""
    prediction = config.prediction
    if classes > 1 or not (prediction.weight and prediction.class_weight):
        return
    if prediction.class_loss == "kl":
        raise UserError(
            "distillation.prediction.class_loss 'kl' compares a softmax over the classes, and the "
            "data has one class: the loss would always be 0. Set "
            "distillation.prediction.class_loss to 'bce' or 'focal' and "
            "distillation.prediction.temperature to 1"
        )


def _check_lone_queries(student: int, teacher: int, keys: list[str]) -> None:
    """The attention of a query to itself alone is 1 whatever the weights."""
    if keys:
        names = " and ".join(f"distillation.{key}" for key in keys)
        raise UserError(
            "distillation.self_attention compares how queries attend to each other, but of "
            f"{student} student and {teacher} teacher queries "
            f"{names} {'leave' if len(keys) > 1 else 'leaves'} one: the loss would "
            "always be 0. Raise that, or the detectors' queries, or set "
            "distillation.self_attention.weight to 0"
        )
