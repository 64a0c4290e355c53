"""What a checkpoint holds of a run, and how a run goes on from it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from d3etr.errors import UserError
from d3etr.training.assembly import Models
from d3etr.training.checkpoints import Checkpoint, CheckpointStore, State
from d3etr.training.context import TrainContext
from d3etr.training.examination import Examination
from d3etr.training.inputs import ensure_same_inputs
from d3etr.training.optimiser import restore_optimiser
from d3etr.training.steplog import StepLog, TrainingCost
from d3etr.training.storage import clear_disk_errors, link_or_copy, temporary_beside

FORMAT = 1


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        teacher_mAP: what the teacher was found to reach, once that is known.
    """

    step: int = 0
    teacher_mAP: float | None = None


def find_checkpoint(store: CheckpointStore, context: TrainContext) -> Checkpoint | None:
    """The newest intact checkpoint: worker 0 verifies, the others use the same.

    Raises:
        UserError: all are damaged, or a worker does not see what worker 0 found.
    """
    found = store.newest() if context.rank == 0 else None
    step = -1 if found is None else found.step
    shared = torch.tensor(step if context.rank == 0 else 0, device=context.device)
    step = int(context.all_reduce(shared))
    if step < 0:
        return None
    return found or store.at(step)


def collect_state(
    progress: Progress, models: Models, examination: Examination, log: StepLog
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
    examination: Examination,
    log: StepLog,
    context: TrainContext,
) -> Progress:
    """Put everything back as it was.

    Raises:
        UserError: teacher or data are not what the run began with.
    """
    state = checkpoint.state()
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
    temporary = temporary_beside(target)
    with clear_disk_errors("the student's weights", target.parent):
        link_or_copy(kept, temporary)
        os.replace(temporary, target)
        temporary.unlink(missing_ok=True)  # renaming one link onto another of a file does nothing


def _check_format(state: State, folder: Path) -> None:
    if state.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {state.get('format')}, this d3etr writes {FORMAT}: finish the "
            "run with the d3etr that began it, or give it another name to start anew"
        )
