"""What a checkpoint holds of a run, and how a run goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType

import torch
from torch import Tensor

from d3etr.distiller import current_names
from d3etr.engine.build import Models
from d3etr.engine.checkpoints import STATE_FILE, Checkpoint, CheckpointStore, State
from d3etr.engine.distributed import TrainContext
from d3etr.engine.metric_logger import MetricLogger, TrainingCost
from d3etr.engine.optimiser import restore_optimiser
from d3etr.engine.provenance import ensure_same_inputs
from d3etr.engine.validation import Validation
from d3etr.errors import UserError
from d3etr.files import (
    DamagedFileError,
    atomic_write,
    clear_disk_errors,
    link_or_copy,
)

FORMAT = 1
_KINDS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "teacher_mAP": (float, int, NoneType),
    "last": dict,
    "digests": dict,
    "model": dict,
    "optimiser": dict,
    "average": (dict, NoneType),
    "stability": (Tensor, NoneType),
    "kept": (dict, NoneType),
}
"""Types of what a state holds."""


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        teacher_mAP: what the teacher was found to reach, once that is known.
    """

    step: int = 0
    teacher_mAP: float | None = None


def find_checkpoint(
    store: CheckpointStore, models: Models, context: TrainContext
) -> Checkpoint | None:
    """The newest intact checkpoint: worker 0 verifies, the others use the same.

    Raises:
        UserError: all are damaged, one is of another version of d3etr, or a worker does not see
            what worker 0 found.
    """
    found = store.newest(lambda one: ensure_usable(one, models)) if context.rank == 0 else None
    step = -1 if found is None else found.step
    shared = torch.tensor(step if context.rank == 0 else 0, device=context.device)
    step = int(context.all_reduce(shared))
    if step < 0:
        return None
    return found or store.at(step)


def collect_state(
    progress: Progress, models: Models, examination: Validation, log: MetricLogger
) -> State:
    """Everything that a resume needs.

    No generator states and no schedule: both are functions of the step.
    """
    stability = examination.stability
    return {
        "format": FORMAT,
        "step": progress.step,
        "teacher_mAP": progress.teacher_mAP,
        "cost": asdict(log.cost),
        "last": log.last,
        "digests": dict(models.digests),
        "model": models.distiller.state_dict(),
        "optimiser": models.optimiser.state_dict(),
        "average": None if models.average is None else models.average.state_dict(),
        "stability": None if stability is None else stability.state,
        "kept": examination.kept,
    }


def restore_state(
    checkpoint: Checkpoint,
    models: Models,
    examination: Validation,
    log: MetricLogger,
    context: TrainContext,
) -> Progress:
    """Put everything back as it was.

    Raises:
        UserError: teacher or data are not what the run began with.
    """
    state = _read(checkpoint)
    _check_format(state, checkpoint.folder)
    ensure_same_inputs(state["digests"], models.digests, checkpoint.folder.parent.parent)
    models.distiller.load_state_dict(state["model"])
    restore_optimiser(models.optimiser, state["optimiser"])
    if models.average is not None:
        models.average.load_state_dict(state["average"])
    if examination.stability is not None and context.rank == 0:
        examination.stability.state = state["stability"]
    examination.kept = state["kept"]
    log.cost = _cost(state)
    log.last = state["last"]
    if context.rank == 0:
        restore_weights(checkpoint.weights, examination.weights)
    return Progress(state["step"], state["teacher_mAP"])


def _read(checkpoint: Checkpoint) -> State:
    """The state in a checkpoint, its tensors under today's names."""
    state = checkpoint.state()
    if isinstance(state, dict) and isinstance(state.get("model"), Mapping):
        state["model"] = current_names(state["model"])
    return state


def _cost(state: State) -> TrainingCost:
    """Older checkpoints hold wall time only."""
    if "cost" in state:
        return TrainingCost(**state["cost"])
    return TrainingCost(state["seconds"], cpu_seconds=None)


def restore_weights(kept: Path | None, target: Path) -> None:
    """Put the weights file back that belongs to a checkpoint.

    The run may have gone further and replaced it before it was killed.
    """
    if kept is None:
        target.unlink(missing_ok=True)
        return
    what = "the student's weights"
    with clear_disk_errors(what, target.parent), atomic_write(target) as temporary:
        link_or_copy(kept, temporary)


def ensure_usable(checkpoint: Checkpoint, models: Models) -> None:
    """Make sure that a state is one, of these models, before any of it is put back.

    Raises:
        DamagedFileError: naming what is not as it was written.
        UserError: another version of d3etr wrote it.
    """
    state = _read(checkpoint)
    if not isinstance(state, dict):
        raise DamagedFileError(f"{STATE_FILE} holds a {type(state).__name__}, expected a dict")
    _check_format(state, checkpoint.folder)
    for key, kinds in _KINDS.items():
        if not isinstance(state.get(key), kinds):
            found = type(state[key]).__name__ if key in state else "nothing"
            raise DamagedFileError(f"{STATE_FILE} has {found} as '{key}'")
    if state["step"] != checkpoint.step:
        raise DamagedFileError(f"{STATE_FILE} is of step {state['step']}")
    _ensure_shapes("model", state["model"], models.distiller.state_dict())
    if models.average is not None:
        _ensure_shapes("average", state["average"], models.average.state_dict())
    try:
        _cost(state)
        sizes = [len(group["params"]) for group in state["optimiser"]["param_groups"]]
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"{STATE_FILE} lacks a part: {error}") from error
    if sizes != [len(group["params"]) for group in models.optimiser.param_groups]:
        raise DamagedFileError(f"{STATE_FILE} has an optimiser of other parameters")


def _ensure_shapes(key: str, found: object, expected: Mapping[str, object]) -> None:
    shapes = {name: x.shape for name, x in expected.items() if isinstance(x, Tensor)}
    tensors = found if isinstance(found, Mapping) else {}
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            there = list(tensor.shape) if isinstance(tensor, Tensor) else "none"
            raise DamagedFileError(
                f"'{key}' in {STATE_FILE} has {there} as {name}, expected {list(shape)}"
            )


def _check_format(state: State, folder: Path) -> None:
    if state.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {state.get('format')}, this d3etr writes {FORMAT}: finish the "
            "run with the d3etr that began it, or give it another name to start anew"
        )
