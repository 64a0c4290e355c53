"""People's own code in a run watches it and changes nothing."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import MakeConfig

from d3etr import registry
from d3etr.config.tree import Config
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.hooks import Hook, TrainingEvent
from d3etr.engine.journal import read_journal
from d3etr.engine.run import run_training
from d3etr.errors import UserError


def train(config: Config, run_dir: Path, hooks: Sequence[Hook] = ()) -> dict[str, float]:
    return run_training(config, run_dir, SingleProcess(torch.device("cpu")), hooks)


class Curious(Hook):
    """Notes what it is called with, draws random numbers, and puts the student in another mode."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, Mapping[str, float]]] = []

    def _look(self, name: str, event: TrainingEvent) -> None:
        self.seen.append((name, event.step, event.metrics))
        torch.rand(3), np.random.rand(), random.random()
        event.student.eval()

    def on_step(self, event: TrainingEvent) -> None:
        self._look("step", event)

    def on_evaluation(self, event: TrainingEvent) -> None:
        self._look("evaluation", event)

    def on_end(self, event: TrainingEvent) -> None:
        self._look("end", event)


def test_a_watched_run_is_bit_for_bit_that_of_before(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config, hook = make_config(detector={"dropout": 0.1}), Curious()
    train(config, tmp_path / "alone")
    summary = train(config, tmp_path / "watched", [hook])
    alone, watched = (
        load_file(tmp_path / run / "weights.safetensors") for run in ("alone", "watched")
    )
    assert all(torch.equal(tensor, watched[name]) for name, tensor in alone.items())
    steps = [(name, step) for name, step, _ in hook.seen if name != "step"]
    assert steps == [("evaluation", 6), ("evaluation", 12), ("end", 12)]
    assert [step for name, step, _ in hook.seen if name == "step"] == list(range(1, 13))
    assert hook.seen[-1][2]["mAP"] == summary["mAP"]
    with pytest.raises(TypeError):
        hook.seen[-1][2]["mAP"] = 1.0  # type: ignore[index]


def test_a_hook_that_fails_is_named_and_not_called_again(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    class Broken(Hook):
        calls = 0

        def on_step(self, event: TrainingEvent) -> None:
            self.calls += 1
            raise ZeroDivisionError("no steps")

    hook, other = Broken(), Curious()
    train(make_config(), tmp_path / "run", [hook, other])
    texts = [r["text"] for r in read_journal(tmp_path / "run/journal.jsonl") if "text" in r]
    (text,) = [text for text in texts if "hook" in text]
    assert "Broken.on_step failed (ZeroDivisionError: no steps): it is not called again" in text
    assert hook.calls == 1 and len(other.seen) == 15


@pytest.mark.parametrize("change", ["in place", "replaced", "frozen"])
def test_a_hook_that_changes_weights_ends_the_run(
    make_config: MakeConfig, tmp_path: Path, change: str
) -> None:
    class Meddler(Hook):
        def on_step(self, event: TrainingEvent) -> None:
            student: Any = event.student
            if change == "in place":
                with torch.no_grad():
                    student.class_head.weight.mul_(1.0)
            elif change == "replaced":
                student.class_head.weight = torch.nn.Parameter(student.class_head.weight.detach())
            else:
                student.class_head.requires_grad_(False)

    with pytest.raises(UserError, match=r"Meddler\.on_step changed the student's weights"):
        train(make_config(), tmp_path / "run", [Meddler()])


def test_a_recipe_names_hooks_of_packages(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [EntryPoint("curious", f"{__name__}:Curious", "d3etr.hooks")]
    monkeypatch.setattr(registry, "_entry_points", lambda group, path: points)
    seen: list[str] = []
    monkeypatch.setattr(Curious, "_look", lambda self, name, event: seen.append(name))
    train(make_config(run={"hooks": ("curious",)}), tmp_path / "run")
    assert seen[-1] == "end"
    with pytest.raises(UserError, match="there is no hook 'curios'; did you mean 'curious'"):
        train(make_config(run={"hooks": ("curios",)}), tmp_path / "other")
