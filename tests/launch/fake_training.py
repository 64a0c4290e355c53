"""Stands in for training where a test is about launching: it writes what training would."""

import json
import os
import signal
import time
from pathlib import Path

import torch

from d3etr.config.tree import Config
from d3etr.engine.distributed import TrainContext
from d3etr.engine.journal import Journal
from d3etr.errors import UserError

STEPS_PER_EPOCH = 4


def train(config: Config, run_dir: Path, context: TrainContext) -> dict[str, float]:
    """An "epoch" adds up the workers' numbers; a checkpoint is a file with its step."""
    steps = (config.optimisation.epochs or 1) * STEPS_PER_EPOCH
    checkpoint, journal = run_dir / "checkpoint.json", Journal(run_dir / "journal.jsonl")
    done = json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0
    if context.rank == 0:
        journal.cut_back(done)
        journal.write("start", done, steps=steps, steps_per_epoch=STEPS_PER_EPOCH)
    for step in range(done + 1, steps + 1):
        misbehave(run_dir, context, step)
        total = context.all_reduce(torch.ones(1, device=context.device)).item()
        if context.rank == 0:
            journal.write("step", step, epoch=0, metrics={"train/loss": total / step})
        if step % STEPS_PER_EPOCH == 0:
            if context.rank == 0:
                checkpoint.write_text(json.dumps({"step": step}))
                journal.write("evaluation", step, metrics={"val/mAP": step / steps})
            context.report({"val/mAP": step / steps})
    if context.rank == 0:
        metrics = {"mAP": 1.0, "world_size": context.world_size}
        (run_dir / "weights.safetensors").write_bytes(b"weights")
        (run_dir / "summary.json").write_text(json.dumps(metrics))
        journal.write("end", steps, metrics=metrics)
    context.barrier()
    return {"mAP": 1.0}


def misbehave(run_dir: Path, context: TrainContext, step: int) -> None:
    """Do what the test has written to a file: kind, rank and step; once only."""
    order = run_dir.parent / "order.json"
    if not order.exists():
        return
    kind, rank, at = json.loads(order.read_text())
    if rank != context.rank or at != step:
        return
    if kind != "raise":  # an exception is to come again on each attempt
        order.unlink()
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "mistake":
        raise UserError("image 17 is truncated")
    if kind == "raise":
        raise ZeroDivisionError("a bug")
    if kind == "sleep":
        (run_dir / "asleep").write_text(str(os.getpid()))
        time.sleep(60)
