"""What a checkpoint holds of a run, and how a run is resumed from it."""

from __future__ import annotations

from dataclasses import asdict

import torch

from d3etr.distiller import current_names
from d3etr.engine.build import Run
from d3etr.engine.checkpoints import STATE_FILE, Checkpoint, CheckpointStore, State
from d3etr.engine.metric_logger import MetricLogger, TrainingCost
from d3etr.engine.optimiser import restore_optimiser
from d3etr.engine.provenance import ensure_same_inputs
from d3etr.engine.validation import Validation
from d3etr.errors import UserError
from d3etr.files import DamagedFileError, atomic_write, clear_disk_errors, link_or_copy

FORMAT = 1


def collect_state(run: Run, validation: Validation, log: MetricLogger) -> State:
    """Everything that a resume needs.

    No generator states and no schedule: both are functions of the step.
    """
    models, stability = run.models, validation.stability
    return {
        "format": FORMAT,
        "step": run.step,
        "teacher_mAP": validation.teacher_mAP,
        "cost": asdict(log.cost),
        "last": log.last,
        "digests": dict(models.digests),
        "model": models.distiller.state_dict(),
        "optimiser": models.optimiser.state_dict(),
        "average": None if models.average is None else models.average.state_dict(),
        "stability": None if stability is None else stability.state,
        "kept": validation.kept,
    }


def resume(store: CheckpointStore, run: Run, validation: Validation, log: MetricLogger) -> bool:
    """Put the newest intact checkpoint back; worker 0 verifies, the others use the same.

    Returns:
        Whether there was one; the run stands at its step then, else it begins.

    Raises:
        UserError: all are damaged, one is of another version of d3etr, teacher or data are not
            what the run began with, or a worker does not see what worker 0 found.
    """
    context, found = run.context, None
    if context.rank == 0:
        found = store.newest(lambda one: _restore(one, run, validation, log))
        store.remove_leftovers()
    known = 0 if context.rank else -1 if found is None else found.step
    step = int(context.all_reduce(torch.tensor(known, device=context.device)))
    if context.rank != 0 and step >= 0:
        _restore(store.at(step), run, validation, log)
    return step >= 0


def _restore(checkpoint: Checkpoint, run: Run, validation: Validation, log: MetricLogger) -> None:
    """Put a checkpoint back; what a damaged one leaves behind, the one before it replaces.

    Raises:
        DamagedFileError: its sums are right, but it does not hold the state of this run.
        UserError: another version of d3etr wrote it, or teacher or data have changed.
    """
    state = checkpoint.state()
    if isinstance(state, dict) and state.get("format") != FORMAT:
        raise UserError(
            f"{checkpoint.folder} has format {state.get('format')}, this d3etr writes {FORMAT}: "
            "finish the run with the d3etr that began it, or give it another name to start anew"
        )
    try:
        if state["step"] != checkpoint.step:
            raise ValueError(f"is of step {state['step']}")
        ensure_same_inputs({**state["digests"]}, run.models.digests, run.folder.path)
        _load(state, run, validation, log)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedFileError(f"{STATE_FILE} is not the state of this run: {error}") from error
    if run.context.rank == 0:
        _restore_weights(checkpoint, run)


def _load(state: State, run: Run, validation: Validation, log: MetricLogger) -> None:
    models = run.models
    models.distiller.load_state_dict(current_names(state["model"]))
    restore_optimiser(models.optimiser, state["optimiser"])
    if models.average is not None:
        models.average.load_state_dict(state["average"])
    if validation.stability is not None and run.context.rank == 0:
        validation.stability.state = state["stability"]
    validation.teacher_mAP = state["teacher_mAP"]
    validation.kept = None if state["kept"] is None else {**state["kept"]}
    log.last = {**state["last"]}
    if "cost" in state:
        log.cost = TrainingCost(**state["cost"])
    else:  # older checkpoints hold wall time only
        log.cost = TrainingCost(state["seconds"], cpu_seconds=None)
    run.step = state["step"]


def _restore_weights(checkpoint: Checkpoint, run: Run) -> None:
    """Put the weights file of the checkpoint back: the run may have replaced it since."""
    kept, target = checkpoint.weights, run.folder.weights
    if kept is None:
        target.unlink(missing_ok=True)
        return
    what = "the student's weights"
    with clear_disk_errors(what, target.parent), atomic_write(target) as temporary:
        link_or_copy(kept, temporary)
