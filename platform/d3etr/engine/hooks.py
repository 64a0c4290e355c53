"""People's own code in a training run: called at steps, evaluations and the end.

Hooks run on the first worker and change nothing. Random numbers, training mode and weights are as
before when a hook returns; one that changed weights ends the run, and one that raises is reported
and not called again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.registry import HOOKS

logger = get_logger(__name__)


@dataclass(frozen=True)
class TrainingEvent:
    """What a hook is given.

    Attributes:
        run_dir: the run's folder; own files go into it under names of one's own.
        step: optimiser steps done.
        metrics: numbers by name as in the run's journal, or as in ``summary.json`` at the end.
        student: the detector that is trained, to be looked at only.
    """

    run_dir: Path
    step: int
    metrics: Mapping[str, float]
    student: nn.Module


class Hook:
    """Base class: override what is of interest."""

    def on_step(self, event: TrainingEvent) -> None:
        """After each record of steps, at most 20 an epoch; metrics are means since the last."""

    def on_evaluation(self, event: TrainingEvent) -> None:
        """After each measurement on the validation split."""

    def on_end(self, event: TrainingEvent) -> None:
        """After the last step and measurement, before the run counts as finished."""


class Hooks:
    """The hooks of a run.

    Args:
        hooks: objects, and names that installed packages give theirs.
        run_dir: the run's folder.
        student: the detector that is trained.
        warn: takes a sentence about a hook that failed.

    Raises:
        UserError: no package brings a hook of that name, or it cannot be made.
    """

    def __init__(
        self,
        hooks: Sequence[Hook | str],
        run_dir: Path,
        student: nn.Module,
        warn: Callable[[str], None],
    ) -> None:
        self._hooks = list[Hook]()
        for hook in hooks:
            try:
                self._hooks.append(HOOKS.find(hook)() if isinstance(hook, str) else hook)
            except UserError:
                raise
            except Exception as error:  # whatever another package's constructor raises
                problem = f"{type(error).__name__}: {error}"
                raise UserError(f"run.hooks: hook '{hook}' cannot be made: {problem}") from error
        self._run_dir, self._student, self._warn = run_dir, student, warn

    def call(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """Call ``on_step``, ``on_evaluation`` or ``on_end`` of every hook.

        Raises:
            UserError: a hook changed the student's weights.
        """
        for hook in list(self._hooks):
            given = MappingProxyType(dict(metrics))
            who = f"{type(hook).__module__}.{type(hook).__qualname__}.{name}"
            with _unchanged(self._student, who):
                try:
                    getattr(hook, name)(TrainingEvent(self._run_dir, step, given, self._student))
                except Exception as error:  # whatever people's code raises
                    logger.exception("hook %s failed", who)
                    self._hooks.remove(hook)
                    self._warn(
                        f"hook {who} failed ({type(error).__name__}: {error}): it is not called "
                        "again, and training continues without it"
                    )


@contextmanager
def _unchanged(student: nn.Module, who: str) -> Iterator[None]:
    """Keep random numbers and training mode; refuse changed weights."""
    before, training = _weights(student), student.training
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield
    random.setstate(python)
    np.random.set_state(numbers)
    if student.training != training:
        student.train(training)
    if _weights(student) != before:
        raise UserError(
            f"hook {who} changed the student's weights: hooks look at a run and change nothing. "
            "Copy the student (copy.deepcopy) before changing it"
        )


def _weights(module: nn.Module) -> list[tuple[str, int, int, bool]]:
    """Differs once any tensor was replaced, written to or frozen; costs microseconds."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [(name, id(x), x._version, x.requires_grad) for name, x in tensors]
