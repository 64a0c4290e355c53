"""Real training with something done to one worker on the way, once per run."""

import os
import signal
import threading
import time
from pathlib import Path

from d3etr.config.tree import Config
from d3etr.engine.distributed import TrainContext
from d3etr.engine.journal import read_journal
from d3etr.errors import UserError
from d3etr.launch.processes import train

RANK, STEP = 1, 9
"""Step 9 is in the middle of the second epoch of six steps."""


def train_and_kill(config: Config, run_dir: Path, context: TrainContext) -> dict[str, float]:
    """Worker 1 is killed in the middle of the second epoch."""
    if context.rank == RANK and not (run_dir / "killed").exists():
        threading.Thread(target=_kill_later, args=(run_dir,), daemon=True).start()
    return train(config, run_dir, context)


def _kill_later(run_dir: Path) -> None:
    while all(record["step"] < STEP for record in read_journal(run_dir / "journal.jsonl")):
        time.sleep(0.005)
    (run_dir / "killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def mistake_on_one_worker(config: Config, run_dir: Path, context: TrainContext) -> dict[str, float]:
    """Worker 1 meets a user's mistake while worker 0 waits for it."""
    (run_dir / f"attempt-{context.rank}-{os.getpid()}").touch()
    context.barrier()
    if context.rank == RANK:
        raise UserError("image 17 is truncated")
    context.barrier()
    return {}


def bug(config: Config, run_dir: Path, context: TrainContext) -> dict[str, float]:
    """Every worker meets the same bug."""
    (run_dir / f"attempt-{context.rank}-{os.getpid()}").touch()
    raise ZeroDivisionError("a bug")
