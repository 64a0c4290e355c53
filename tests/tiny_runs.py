"""Pieces of the tiny runs that the training tests do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import save_untrained, tiny_detector_config

from d3etr.config.data import DataConfig
from d3etr.config.tree import Config
from d3etr.engine.checkpoints import CheckpointStore, State
from d3etr.engine.journal import read_journal

MakeConfig = Callable[..., Config]

DETECTOR = tiny_detector_config(
    width=32, feedforward=32, queries=6, dropout=0.1, box_size_bias=-1.4
)


def write_teacher(path: Path, data: DataConfig, **info: Any) -> None:
    """An untrained teacher's weights file; ``info`` replaces fields of its metadata."""
    detector = DETECTOR.model_copy(update={"queries": 8, "dropout": 0.0})
    save_untrained(path, detector, data, **info)


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Step, epoch and metrics of a journal's records of a kind, without anything timed."""
    return [
        {
            "step": record["step"],
            "epoch": record.get("epoch"),
            "metrics": {
                name: value
                for name, value in record["metrics"].items()
                if not name.startswith(("time/", "system/"))
            },
        }
        for record in read_journal(run_dir / "journal.jsonl")
        if record["kind"] == kind
    ]


def values(run_dir: Path, name: str) -> list[float]:
    """A metric of every step record."""
    return [record["metrics"][name] for record in records(run_dir, "step")]


def losses(run_dir: Path) -> list[float]:
    """The total loss of every step record."""
    return values(run_dir, "train/loss")


def final_state(run_dir: Path) -> State:
    """What the newest checkpoint holds, without anything timed."""
    checkpoint = CheckpointStore(run_dir / "checkpoints", keep=1).newest()
    assert checkpoint is not None
    state = checkpoint.state()
    for name in ("cost", "last"):
        del state[name]
    if state["kept"] is not None:
        del state["kept"]["images_per_second"]
    return state


def assert_identical(left: Any, right: Any) -> None:
    """Equal to the last bit, tensors included."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_identical(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_identical(a, b)
    else:
        assert left == right


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Two runs ended bit for bit alike, and neither journal has a gap or a repeated step."""
    assert_identical(final_state(run_dir), final_state(reference))
    for kind in ("step", "evaluation", "teacher"):
        assert records(run_dir, kind) == records(reference, kind)
    for folder in (run_dir, reference):
        steps = [record["step"] for record in records(folder, "step")]
        assert steps == sorted(set(steps))
    weights = [load_file(folder / "weights.safetensors") for folder in (run_dir, reference)]
    assert_identical(*weights)
