"""The recipes of a project, as plain values: what all of them share, and each one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from d3etr.config.detector import DetectorPart
from d3etr.config.load import plain_tree
from d3etr.config.location import Location
from d3etr.config.overrides import Tree, merge
from d3etr.detectors.torchvision_weights import has_imagenet_weights
from d3etr.detectors.weights import WeightsInfo
from d3etr.project.backbones import Backbones
from d3etr.project.sizes import Sizes

TEACHER, PLAIN, INHERITED, DISTILLED = "teacher", "plain", "inherited", "distilled"
ROLES = (TEACHER, PLAIN, INHERITED, DISTILLED)
BASE = "base"
RUNS = "runs"
"""Folder of the project that its runs are in."""
TEACHER_WEIGHTS = "weights/teacher.safetensors"
"""Where the project keeps its trained teacher, relative to its folder."""
NEVER = 1_000_000
EVALUATIONS = 6
"""On validation along a run."""
_WARM_UP, _WARM_UP_SHARE = 100, 10
_START: tuple[DetectorPart, ...] = ("decoder", "heads", "queries")
_PARTS_FROM_NOTHING: tuple[DetectorPart, ...] = ("encoder", *_START)
_ALL_PARTS: tuple[DetectorPart, ...] = ("backbone", *_PARTS_FROM_NOTHING)


@dataclass(frozen=True)
class Start:
    """Weights that know other objects, which teacher and students are fine-tuned from.

    Attributes:
        teacher: file; relative ones are the project's.
        student: file.
        teacher_detector: architecture, as plain values.
        student_detector: architecture, as plain values.
        normalisation: of the images of both.
        there: whether the files are there already.
        shares_backbone: an inherited student takes backbone and encoder of the teacher too, as
            nobody has ImageNet weights of its own.
    """

    teacher: Location
    student: Location
    teacher_detector: Tree
    student_detector: Tree
    normalisation: str
    there: bool
    shares_backbone: bool = False

    @property
    def inherited_parts(self) -> tuple[DetectorPart, ...]:
        """What an inherited student takes of the teacher."""
        return _ALL_PARTS if self.shares_backbone else _START


RT_DETR = Start(
    teacher=Path("weights/coco-rtdetr-r50.safetensors"),
    student=Path("weights/coco-rtdetr-r18.safetensors"),
    teacher_detector={
        "name": "rt_detr",
        "backbone": {"name": "resnet50vd", "frozen_stages": 1},
        "dropout": 0.0,
    },
    student_detector={
        "name": "rt_detr",
        "backbone": {"name": "resnet18vd"},
        "expansion": 0.5,
        "decoder_layers": 3,
        "dropout": 0.0,
    },
    normalisation="unit",
    there=False,
)
"""What is recommended on a GPU; the two files are imported by hand."""


def start_from(
    teacher: Location, student: Location, infos: tuple[WeightsInfo, WeightsInfo]
) -> Start:
    """A start from two weights files.

    Args:
        teacher: the larger detector's file.
        student: the smaller one's.
        infos: what the files say of themselves.
    """
    theirs, ours = (plain_tree(info.detector) for info in infos)
    normalisation = infos[1].preprocessing.normalisation
    shares = not has_imagenet_weights(infos[1].detector.backbone)
    return Start(teacher, student, theirs, ours, normalisation, True, shares)


@dataclass(frozen=True)
class Design:
    """What a project trains.

    Attributes:
        sizes: of images, batches and detectors.
        start: weights to fine-tune; None learns from nothing.
        workers: processes that load images.
        test: whether there is a test split.
        views: augmentations of each image that the teacher sees once, before a distilled student
            trains (``teacher.views``); 0: it sees every image of every step.
        backbones: pre-trained ones of detectors that otherwise learn from nothing.
    """

    sizes: Sizes
    start: Start | None
    workers: int
    test: bool
    views: int = 0
    backbones: Backbones | None = None


def project_trees(
    design: Design,
    data: Tree,
    steps: Mapping[str, int],
    seconds: Mapping[str, float] | None = None,
    minutes: Mapping[str, float] | None = None,
) -> dict[str, Tree]:
    """Recipe name -> its values; all but ``base`` extend that.

    Args:
        design: what is trained.
        data: ``data.train`` and the other splits.
        steps: optimiser steps of each role.
        seconds: of one step of each role, where measured: checkpoints are a minute apart.
        minutes: of each role's whole run.
    """
    shared, own = (_from_nothing if design.start is None else _fine_tuned)(design)
    if design.backbones is not None:
        shared, own = _over_backbones(design.backbones, shared, own)
    base = merge(_base(design, data), shared)
    trees = {BASE: base}
    for role in ROLES:
        length = steps[role]
        every = NEVER if seconds is None else max(1, round(60 / max(seconds[role], 1e-3)))
        tree: Tree = {
            "extends": f"{BASE}.yaml",
            "run": {"name": role, "checkpoint_every_steps": min(every, length)},
            "optimisation": {
                "steps": length,
                "schedule": {"warmup_steps": min(_WARM_UP, max(1, length // _WARM_UP_SHARE))},
            },
            "evaluation": {"every_steps": max(1, length // EVALUATIONS)},
        }
        if role == TEACHER:
            tree["run"]["role"] = "teacher"
        if minutes is not None:
            tree["run"]["minutes"] = round(minutes[role], 1)
        trees[role] = merge(tree, own[role])
    return trees


def resolved(trees: Mapping[str, Tree], role: str) -> Tree:
    """A recipe merged over ``base``."""
    own = {key: value for key, value in trees[role].items() if key != "extends"}
    return merge(trees[BASE], own)


def _base(design: Design, data: Tree) -> Tree:
    return {
        "run": {"output": RUNS, "checkpoint_every_epochs": NEVER},
        "data": {**data, "workers": design.workers},
        "optimisation": {"batch_size": design.sizes.batch},
        "evaluation": {
            "every_epochs": NEVER,  # every_steps says when
            "batch_size": max(8, design.sizes.batch),
            "test": design.test,
            "keep": "best",
        },
    }


def _from_nothing(design: Design) -> tuple[Tree, dict[str, Tree]]:
    """Deformable DETR of two levels over a small backbone: what learns on two cores.

    Our choice, by measurement on circuit boards and blood cells: this detector learnt from a few
    hundred images and random weights within minutes, where Conditional DETR needed a pre-trained
    backbone and ResNets a multiple of the time.
    """
    sizes = design.sizes
    shared: Tree = {
        "data": {
            "preprocessing": sizes.sides(),
            "augmentation": {"horizontal_flip": 0.5, "colour_jitter": 0.2},
        },
        "student": {
            "detector": {
                "name": "deformable_detr",
                "levels": 2,
                "box_refinement": True,
                "backbone": {
                    "name": "small",
                    "stem_width": 16,
                    "stage_widths": [16, 32, 48, 64],
                    "stage_blocks": 1,
                },
                "width": 128,
                "heads": 8,
                "encoder_layers": 1,
                "decoder_layers": 3,
                "feedforward": 256,
                "queries": sizes.queries,
                "dropout": 0.0,
                "box_size_bias": sizes.size_bias,
            },
            "backbone_weights": None,
        },
        "optimisation": {
            "learning_rate": 1e-3,
            "backbone_rate_factor": 1.0,
            "schedule": {"kind": "cosine", "final_factor": 0.01},
        },
    }
    teacher: Tree = {"student": {"detector": {"backbone": {"stage_widths": [32, 64, 96, 128]}}}}
    if sizes.scale != 1:
        teacher["data"] = {"preprocessing": sizes.sides(sizes.scale)}
    inherited = {"weights": TEACHER_WEIGHTS, "parts": [*_PARTS_FROM_NOTHING]}
    return shared, {
        TEACHER: teacher,
        PLAIN: {},
        INHERITED: {"student": {"initialise_from": inherited}},
        DISTILLED: _taught(design),
    }


def _over_backbones(
    backbones: Backbones, shared: Tree, own: dict[str, Tree]
) -> tuple[Tree, dict[str, Tree]]:
    """The detectors that learn from nothing, over pre-trained backbones that learn slowly."""
    detector = shared["student"]["detector"]
    levels = len(backbones.student.strides)
    over = {key: value for key, value in detector.items() if key != "backbone"}
    student = merge({"detector": {**over, "levels": levels}}, backbones.student.tree)
    changed = {**shared, "student": student}
    changed["optimisation"] = {**shared["optimisation"], "backbone_rate_factor": 0.1}
    roles = {**own, TEACHER: {**own[TEACHER], "student": backbones.teacher.tree}}
    if backbones.same:  # then the teacher's, which has learnt these objects
        parts = ["backbone", *_PARTS_FROM_NOTHING]
        taken: Tree = {"student": {"backbone_weights": None, "initialise_from": {"parts": parts}}}
        roles |= {role: merge(own[role], taken) for role in (INHERITED, DISTILLED)}
    return changed, roles


def _taught(design: Design) -> Tree:
    """The distilled student's own values."""
    taught: Tree = {
        "teacher": {"weights": TEACHER_WEIGHTS},
        "student": {"initialise_from": {"parts": [*_PARTS_FROM_NOTHING]}},
        "distillation": {"method": "d3etr", "inherited_ratio": 1.0},
        "optimisation": {"learning_rate": 2e-3},
    }
    if design.sizes.scale != 1:
        taught["teacher"]["image_scale"] = design.sizes.scale
    if design.views:
        taught["teacher"]["views"] = {"count": design.views}
    return taught


def _fine_tuned(design: Design) -> tuple[Tree, dict[str, Tree]]:
    """Two detectors that know other objects, as the recipes ``own/rtdetr-*`` have them."""
    start, side = design.start, design.sizes.side
    assert start is not None
    shared: Tree = {
        "data": {
            "preprocessing": {
                "normalisation": start.normalisation,
                "shortest_side": None,
                "longest_side": None,
                "exact_size": [side, side],
            },
            "augmentation": {
                "shortest_sides": [side + 32 * k for k in range(-3, 4)],
                "horizontal_flip": 0.5,
                "photometric": 0.5,
                "iou_crop": 0.5,
            },
        },
        "student": {"backbone_weights": None},
        "optimisation": {
            "learning_rate": 1e-4,
            "backbone_rate_factor": 0.1,
            "weight_decay": 1e-4,
            "schedule": {"kind": "cosine"},
            "ema_decay": 0.999,
        },
    }
    fine_tuned = {"weights": str(start.student), "parts": [*_ALL_PARTS]}
    of_teacher = {"weights": str(start.teacher), "parts": [*_ALL_PARTS]}
    inherited = {"weights": TEACHER_WEIGHTS, "parts": [*start.inherited_parts]}
    student = start.student_detector
    return shared, {
        TEACHER: {
            "student": {"detector": start.teacher_detector, "initialise_from": of_teacher},
        },
        PLAIN: {"student": {"detector": student, "initialise_from": fine_tuned}},
        INHERITED: {
            "student": {
                "detector": student,
                "initialise_from": inherited,
                "backbone_weights": None if start.shares_backbone else "imagenet",
            },
        },
        DISTILLED: {
            "student": {"detector": student, "initialise_from": fine_tuned},
            "teacher": {"weights": TEACHER_WEIGHTS},
            "distillation": {"method": "d3etr"},
        },
    }
