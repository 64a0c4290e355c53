"""Steps that distil beside steps of plain training: ``every_steps`` and ``share_of_training``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_graphs import batch
from test_workers import train_alone, train_with_two_workers
from tiny import changed, save_untrained
from tiny_runs import MakeConfig, assert_same_run, losses, records

from d3etr.config.data import DataConfig
from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.config.tree import Config
from d3etr.detectors.build import build_detector
from d3etr.distiller import Distiller
from d3etr.engine.find_run import folder_of
from d3etr.structures import ImageBatch

STEPS = 12
"""Of the tiny runs."""


def scheduled(config: Config, **settings: Any) -> Config:
    method = MethodConfig.parse({"method": "d3etr", **settings})
    return config.model_copy(update={"distillation": method})


def distilled_steps(run_dir: Path) -> list[int]:
    """Steps (from 0) whose record has a loss against the teacher; the tiny runs record each."""
    return [r["step"] - 1 for r in records(run_dir, "step") if "train/fixed/l1" in r["metrics"]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, range(10)),
        ({"every_steps": 3}, [0, 3, 6, 9]),
        ({"share_of_training": 0.5}, range(5)),
        ({"share_of_training": 0.41}, range(5)),
        ({"every_steps": 2, "share_of_training": 0.5}, [0, 2, 4]),
        ({"share_of_training": 0.01}, [0]),
    ],
)
def test_which_steps_distil(settings: dict[str, Any], expected: Any) -> None:
    config = MethodConfig.parse({"method": "d3etr", **settings})
    assert [s for s in range(10) if config.distils_at(s, 10)] == list(expected)
    assert config.distilled_steps(10) == len(expected)


def test_no_method_distils_never() -> None:
    config = MethodConfig.parse({"method": "none"})
    assert not config.distils_at(0, 10) and config.distilled_steps(10) == 0
    with pytest.raises(ValidationError, match="has no effect on method 'none'"):
        MethodConfig.parse({"method": "none", "every_steps": 2})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"every_steps": 12}, r"every_steps \(12\) leaves only the first of 12 steps"),
        ({"every_steps": 7, "share_of_training": 0.5}, "share_of_training 0.5 of them"),
        ({"warmup_steps": 7, "share_of_training": 0.5}, r"warmup_steps \(7\) is above the run's 6"),
    ],
)
def test_what_would_never_act_is_refused(
    make_config: MakeConfig, settings: dict[str, Any], text: str
) -> None:
    base = make_config(optimisation={"epochs": None, "steps": STEPS})
    method = MethodConfig.parse({"method": "d3etr", **settings})
    with pytest.raises(ValidationError, match=text):
        Config(**(dict(base) | {"distillation": method}))


def test_a_plain_step_is_that_of_a_student_without_teacher(
    make_config: MakeConfig,
) -> None:
    images, targets = batch(32, 32, (2, 1))
    detector = make_config(detector={"dropout": 0.0}).student.detector
    torch.manual_seed(0)
    student, alone = build_detector(detector, 3), build_detector(detector, 3)
    alone.load_state_dict(student.state_dict())
    teacher = build_detector(changed(detector, width=16), 3)
    criterion = SetCriterionConfig()
    taught = Distiller(student, teacher, MethodConfig.parse({"method": "d3etr"}), criterion, seed=0)
    plain = Distiller(alone, None, MethodConfig.parse({}), criterion, seed=0)
    found = []
    for module in (taught, plain):
        terms = module(images, targets, None, module.normalisers(targets, None))
        torch.stack([*terms.values()]).sum().backward()
        found.append(terms)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    for one, other in zip(student.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    own = [*taught.method.parameters()]
    assert own and all(not p.grad.any() for p in own)  # of no effect, but there for DDP


def test_the_teacher_runs_in_the_steps_that_distil(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run = Distiller.run_teacher

    def counted(self: Distiller, images: ImageBatch, step: int = -1, targets: Any = None) -> Any:
        calls.append(step)
        return run(self, images, step, targets)

    monkeypatch.setattr(Distiller, "run_teacher", counted)
    config = make_config()
    train_alone(scheduled(config, every_steps=3, share_of_training=0.6), tmp_path / "run")
    assert distilled_steps(tmp_path / "run") == [0, 3, 6]
    assert [step for step in calls if step >= 0] == [0, 3, 6]  # others watch the matching


def test_what_was_before_is_the_default(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(optimisation={"epochs": 1})
    explicit = scheduled(config, every_steps=1, share_of_training=1.0)
    assert folder_of(explicit).path == folder_of(config).path
    train_alone(config, tmp_path / "default")
    train_alone(explicit, tmp_path / "explicit")
    assert_same_run(tmp_path / "explicit", tmp_path / "default")


@pytest.mark.slow
def test_two_workers_agree_on_the_steps_and_their_losses(
    make_config: MakeConfig, scenes: DataConfig, tmp_path: Path
) -> None:
    """The teacher is narrower: maps between widths have no part in plain steps."""
    config = make_config(detector={"dropout": 0.0})
    narrow = changed(config.student.detector, width=16, queries=8)
    save_untrained(tmp_path / "teacher.safetensors", narrow, scenes)
    config = make_config(
        detector={"dropout": 0.0}, teacher={"weights": tmp_path / "teacher.safetensors"}
    )
    config = scheduled(config, every_steps=2, share_of_training=0.5)
    train_alone(config, tmp_path / "one")
    train_with_two_workers(config, tmp_path / "two")
    assert distilled_steps(tmp_path / "two") == [0, 2, 4]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stands_at", [4, 8])
def test_a_resumed_run_goes_on_with_the_same_steps(
    make_config: MakeConfig, tmp_path: Path, stands_at: int
) -> None:
    settings = {"run": {"checkpoint_every_steps": 4, "keep_checkpoints": 9}}
    config = scheduled(make_config(**settings), every_steps=2, share_of_training=0.5)
    train_alone(config, tmp_path / "whole")
    train_alone(config, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > stands_at:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    train_alone(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
