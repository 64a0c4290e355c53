"""What a launcher makes a worker do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from d3etr.config.tree import Config
from d3etr.engine.distributed import TrainContext
from d3etr.launch.limits import clear_limits

if TYPE_CHECKING:
    from d3etr.engine.hooks import Hook


class Task(Protocol):
    """Trains ``config`` in ``run_dir`` as one worker and returns the final metrics."""

    def __call__(self, config: Config, run_dir: Path, context: TrainContext) -> dict[str, float]:
        """Train until the end; every worker calls it."""
        ...


def train(
    config: Config, run_dir: Path, context: TrainContext, hooks: Sequence[Hook] = ()
) -> dict[str, float]:
    """The task of every real run; ``hooks`` are people's own code."""
    # Imported by the worker: the driver of a cluster needs no data or model code.
    from d3etr.engine.run import run_training

    with clear_limits():
        return run_training(config, run_dir, context, hooks)
