"""Seconds of training steps and of evaluations of a project's recipes, measured on this machine."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from d3etr.config.backbone import BackboneConfig
from d3etr.config.load import validate
from d3etr.config.overrides import Tree, merge
from d3etr.config.tree import Config
from d3etr.data.allocator import keep_freed_memory
from d3etr.data.splits import DetectionSplit
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.build import build_detector
from d3etr.detectors.weights import WeightsInfo, save_weights, write_tensors
from d3etr.engine.distributed import SingleProcess, TrainContext
from d3etr.engine.step_costs import StepMaker
from d3etr.engine.views import NoRoomError, forecast_views
from d3etr.evaluation.evaluator import Evaluator
from d3etr.project.recipes import BASE, DISTILLED, TEACHER, resolved

WARM_UP_STEPS, STEPS, ROUNDS = 2, 5, 3
LONGEST_SECONDS = 15.0
"""No further round begins once rounds took so long."""
_EVALUATED = 2
"""Batches of validation images that an evaluation is timed on."""
_BUSY = 1.7
"""Wall time over CPU time of steps, from which on others must be using the processor."""


@dataclass(frozen=True)
class Costs:
    """What a recipe costs here, seconds of wall time.

    Attributes:
        step: of an optimiser step, loading included.
        evaluation: of a whole evaluation on validation.
        busy: whether steps waited for other programs of this machine most of the time.
        preparation: before the first step, as where a teacher's passes are stored.
    """

    step: float
    evaluation: float
    busy: bool = False
    preparation: float = 0.0


class DoesNotFit(Exception):  # noqa: N818 - it says what happened
    """A step needs more memory than the GPU has."""


Measure = Callable[[Mapping[str, Tree], str, Mapping[str, DetectionSplit]], Costs]
"""Takes trees of a project, the role that is meant and the splits."""


def measure(trees: Mapping[str, Tree], role: str, splits: Mapping[str, DetectionSplit]) -> Costs:
    """Make a few training steps of a recipe, and evaluate on a few images; nothing is kept.

    Detectors start at random and so does the teacher of a distilled student: values cost no time.

    Args:
        trees: of a project, whose data is where they say.
        role: the recipe.
        splits: of the data.

    Raises:
        DoesNotFit: there is too little memory on the GPU.
        UserError: data cannot be used.
    """
    keep_freed_memory()
    context = SingleProcess()
    with tempfile.TemporaryDirectory() as folder:
        config = _untaught(trees, role, Path(folder), splits["train"])
        try:
            return _measured(config, context, splits["validation"])
        except torch.OutOfMemoryError:
            raise DoesNotFit(role) from None


def storing_problem(trees: Mapping[str, Tree], train: DetectionSplit, runs: Path) -> str | None:
    """Why the passes of a distilled student's teacher cannot be stored; None where they can.

    Args:
        trees: of a project whose distilled student has ``teacher.views``.
        train: the training split.
        runs: the folder that will hold runs and what is stored for them.

    Raises:
        UserError: data cannot be used.
    """
    here: Tree = {"run": {"output": str(runs)}}
    with tempfile.TemporaryDirectory() as folder:
        try:
            forecast_views(
                _untaught({**trees, BASE: merge(trees[BASE], here)}, DISTILLED, Path(folder), train)
            )
        except NoRoomError as error:
            return str(error)
    return None


def _untaught(trees: Mapping[str, Tree], role: str, folder: Path, train: DetectionSplit) -> Config:
    """The recipe without weights of anybody's; a teacher is one of random numbers."""
    alone: Tree = {"student": {"initialise_from": None, "backbone_weights": None}}
    tree = merge(resolved(trees, role), alone)
    tree = merge(tree, {"tracking": {"enabled": False}})
    text = json.dumps(tree["student"]["detector"]["backbone"])
    backbone = BackboneConfig.model_validate_json(text)
    if backbone.keeps_statistics:  # training refuses those of nothing
        network = folder / "backbone.safetensors"
        write_tensors(network, build_backbone(backbone).state_dict(), {})
        tree = merge(tree, {"student": {"backbone_weights": str(network)}})
    if role == DISTILLED:
        teacher = validate(merge(resolved(trees, TEACHER), alone), "the teacher")
        file = folder / "teacher.safetensors"
        info = WeightsInfo(
            detector=teacher.student.detector,
            categories=tuple((c.id, c.name) for c in train.categories),
            preprocessing=teacher.data.preprocessing,
            origin={},
        )
        save_weights(file, build_detector(info.detector, len(train.categories)), info)
        tree = merge(tree, {"teacher": {"weights": str(file)}})
        inherits = tree["distillation"].get("inherited_ratio", 0)
        if inherits:
            tree = merge(tree, {"student": {"initialise_from": {"parts": ["decoder", "queries"]}}})
    return validate(tree, f"the recipe '{role}'")


def _measured(config: Config, context: TrainContext, validation: DetectionSplit) -> Costs:
    maker = StepMaker(config, context)
    try:
        maker.cost(WARM_UP_STEPS, 0)
        taken: list[float] = []
        working: list[float] = []
        for turn in range(ROUNDS):
            if sum(taken) * STEPS > LONGEST_SECONDS:  # slow steps are known well enough
                break
            begun = time.perf_counter()
            working.append(maker.cost(STEPS, WARM_UP_STEPS + turn * STEPS))
            taken.append((time.perf_counter() - begun) / STEPS)
        evaluation = _evaluation(config, context, maker, validation)
    finally:
        maker.close()
    step = statistics.median(taken)
    on_cpu = context.device.type == "cpu"
    return Costs(step, evaluation, on_cpu and step > _BUSY * statistics.median(working))


def _evaluation(
    config: Config, context: TrainContext, maker: StepMaker, validation: DetectionSplit
) -> float:
    """Seconds of an evaluation of all images, from that of some."""
    count = min(len(validation.records), _EVALUATED * config.evaluation.batch_size)
    some = replace(validation, records=validation.records[:count])
    evaluator = Evaluator(some, config.data, config.evaluation, context)
    evaluator.measure(maker.distiller.student)  # what is compiled or read once
    return evaluator.measure(maker.distiller.student).seconds / count * len(validation.records)
