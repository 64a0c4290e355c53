import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    MakeConfig,
    assert_identical,
    assert_same_run,
    final_state,
    losses,
    records,
    write_teacher,
)

from d3etr.config.data import DataConfig
from d3etr.config.detector import TeacherConfig
from d3etr.config.tree import Config
from d3etr.data.splits import open_split
from d3etr.detectors.weights import load_weights
from d3etr.engine.checkpoints import CheckpointStore, State
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.journal import read_journal
from d3etr.engine.metric_logger import TrainingDiverged
from d3etr.engine.run import run_training
from d3etr.engine.step import TrainingStep
from d3etr.errors import UserError
from d3etr.files import sha256


def train(config: Config, run_dir: Path) -> dict[str, float]:
    return run_training(config, run_dir, SingleProcess(torch.device("cpu")))


class Interruption(Exception):  # noqa: N818 - it is no mistake
    """Stands for anything that ends a process."""


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make a method raise at its n-th call; ``interrupt(None)`` repairs it."""

    def break_at(owner: type, name: str, call: int) -> None:
        original, calls = getattr(owner, name), [0]

        def broken(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                raise Interruption
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, broken)

    return break_at


def interrupted_run(
    config: Config, run_dir: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Any, *where: Any
) -> None:
    with monkeypatch.context():
        interrupt(*where)
        with pytest.raises(Interruption):
            train(config, run_dir)
    monkeypatch.undo()
    train(config, run_dir)


def test_a_run_leaves_what_its_contract_says(make_config: MakeConfig, tmp_path: Path) -> None:
    summary = train(make_config(evaluation={"test": True}), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"journal.jsonl", "checkpoints", "weights.safetensors", "summary.json"}
    kinds = [record["kind"] for record in read_journal(tmp_path / "run" / "journal.jsonl")]
    epoch = [*["step"] * 6, "evaluation"]
    kinds = [kind for kind in kinds if kind != "message"]
    assert kinds == ["start", "teacher", *epoch, *epoch, "end"]
    assert {"mAP", "test/mAP", "teacher/mAP", "parameters", "images_per_second"} <= summary.keys()
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (written["method"], written["steps"]) == ("d3etr", 12)
    first, second = records(tmp_path / "run", "evaluation")
    assert "matching/stability" not in first["metrics"]
    assert 0 <= second["metrics"]["matching/stability"] <= 1
    assert (first["step"], first["epoch"], second["step"], second["epoch"]) == (6, 1, 12, 2)


def test_the_weights_file_says_what_it_reaches(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(plain=True)
    summary = train(config, tmp_path / "run")
    detector, info = load_weights(tmp_path / "run" / "weights.safetensors")
    assert info.evaluation is not None
    assert info.evaluation["mAP"] == summary["mAP"]
    assert info.evaluation["split"] == "validation"
    assert info.preprocessing == config.data.preprocessing
    assert info.origin["step"] == summary["kept_step"]
    assert not detector.training


def test_equal_seeds_repeat_a_run_to_the_last_bit(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(run={"seed": 3})
    train(config, tmp_path / "a")
    train(config, tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    train(make_config(run={"seed": 4}), tmp_path / "c")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_a_finished_run_is_not_trained_again(
    make_config: MakeConfig, tmp_path: Path, interrupt: Any
) -> None:
    summary = train(make_config(), tmp_path / "run")
    interrupt(TrainingStep, "__call__", 1)
    assert train(make_config(), tmp_path / "run") == summary


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow, id="epochs"),
        pytest.param(
            {"optimisation": {"ema_decay": 0.9, "accumulation": 2}, "evaluation": {"keep": "last"}},
            marks=pytest.mark.slow,
            id="average",
        ),
        pytest.param({"run": {"checkpoint_every_steps": 4}}, id="within epochs"),
        pytest.param(
            {"run": {"checkpoint_every_steps": 4}, "evaluation": {"every_steps": 2}},
            marks=pytest.mark.slow,
            id="measured within epochs",
        ),
        pytest.param({"run": {"checkpoint_every_epochs": 2}}, marks=pytest.mark.slow, id="rarely"),
    ],
)
def test_a_run_broken_off_between_steps_ends_as_if_nothing_had_been(
    make_config: MakeConfig,
    tmp_path: Path,
    interrupt: Any,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    config = make_config(**settings)
    train(config, tmp_path / "whole")
    interrupted_run(
        config, tmp_path / "broken", monkeypatch, interrupt, TrainingStep, "__call__", 11
    )
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("save", [1, 2])
def test_a_run_broken_off_before_a_checkpoint_repeats_the_epoch(
    make_config: MakeConfig,
    tmp_path: Path,
    interrupt: Any,
    monkeypatch: pytest.MonkeyPatch,
    save: int,
) -> None:
    config = make_config()
    train(config, tmp_path / "whole")
    interrupted_run(
        config, tmp_path / "broken", monkeypatch, interrupt, CheckpointStore, "save", save
    )
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_its_epoch_only(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    train(config, tmp_path / "whole")
    train(config, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    damaged = tmp_path / "run" / "checkpoints" / "step-00000012" / "state.pt"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    messages = [
        record["text"]
        for record in read_journal(tmp_path / "run" / "journal.jsonl")
        if record["kind"] == "message" and "teacher does not lead" not in record["text"]
    ]
    assert len(messages) == 1 and "step-00000012 is damaged" in messages[0]


def without(name: str) -> Callable[[State], Any]:
    return lambda state: {key: value for key, value in state.items() if key != name}


WRONG_STATES: dict[str, Callable[[State], Any]] = {
    "no dict": lambda state: [1, 2],
    "step as text": lambda state: state | {"step": "2"},
    "another step": lambda state: state | {"step": 11},
    "no digests": without("digests"),
    "no optimiser": without("optimiser"),
    "an empty optimiser": lambda state: state | {"optimiser": {}},
    "an optimiser of others": lambda state: state | {"optimiser": {"param_groups": []}},
    "no cost": without("cost"),
    "a model of text": lambda state: state | {"model": dict.fromkeys(state["model"], "x")},
    "a model of other shapes": lambda state: (
        state | {"model": {key: torch.zeros(1, 1, 7) for key in state["model"]}}
    ),
    "kept as a list": lambda state: state | {"kept": []},
}


def test_a_state_of_wrong_types_is_named_and_the_one_before_used(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    short = {"epochs": None, "steps": 2}
    config = make_config(optimisation=short, run={"checkpoint_every_steps": 1}, plain=True)
    run_dir = tmp_path / "run"
    train(config, run_dir)
    reference = losses(run_dir)
    folder = run_dir / "checkpoints" / "step-00000002"
    good = CheckpointStore(run_dir / "checkpoints", keep=2).newest()
    assert good is not None and good.folder == folder
    state, kept = good.state(), load_file(run_dir / "weights.safetensors")
    for wrong in WRONG_STATES.values():
        (run_dir / "summary.json").unlink()
        torch.save(wrong(state), folder / "state.pt")
        manifest = {"step": 2, "sha256": {"state.pt": sha256(folder / "state.pt")}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        train(config, run_dir)
        assert losses(run_dir) == reference
        assert_identical(load_file(run_dir / "weights.safetensors"), kept)
        texts = [r.get("text", "") for r in read_journal(run_dir / "journal.jsonl")]
        assert any("step-00000002 is damaged" in text and "state.pt" in text for text in texts)


def test_a_changed_teacher_is_refused_on_resume(
    make_config: MakeConfig, tmp_path: Path, teacher_weights: Path
) -> None:
    config = make_config()
    train(config, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    original = teacher_weights.read_bytes()
    try:
        teacher_weights.write_bytes(original[:-4] + bytes(4))
        with pytest.raises(UserError, match=r"teacher\.weights is not what the run .* began with"):
            train(config, tmp_path / "run")
    finally:
        teacher_weights.write_bytes(original)


def test_a_teacher_below_the_minimum_stops_the_run_before_it_starts(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"below teacher\.minimum_mAP"):
        train(make_config(teacher={"minimum_mAP": 0.5}), tmp_path / "run")
    assert records(tmp_path / "run", "step") == []


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainingStep.__call__

    def poison(self: TrainingStep, step: int, batches: Any) -> None:
        if step == 8:
            with torch.no_grad():
                self._distiller.student.class_head.weight.fill_(float("nan"))
        original(self, step, batches)

    monkeypatch.setattr(TrainingStep, "__call__", poison)
    with pytest.raises(TrainingDiverged) as caught:
        train(make_config(), tmp_path / "run")
    assert caught.value.step == 8
    assert len(caught.value.image_ids) == 4
    assert final_state(tmp_path / "run")["step"] == 6


def test_a_gradient_that_explodes_stops_the_run_before_its_weights_are_saved(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainingStep._update

    def poison(self: TrainingStep, step: int) -> None:
        if step == 11:
            self._distiller.student.class_head.weight.grad.fill_(float("inf"))  # type: ignore
        original(self, step)

    monkeypatch.setattr(TrainingStep, "_update", poison)
    with pytest.raises(TrainingDiverged, match=r"gradient's norm .* at optimiser step 11"):
        train(make_config(), tmp_path / "run")
    assert final_state(tmp_path / "run")["step"] == 6


def test_steps_may_end_a_run_within_an_epoch(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(optimisation={"epochs": None, "steps": 8})
    assert train(config, tmp_path / "run")["steps"] == 8
    assert [r["step"] for r in records(tmp_path / "run", "step")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [r["epoch"] for r in records(tmp_path / "run", "evaluation")] == [1, 2]


def test_evaluations_come_as_often_as_configured_and_at_the_end(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(optimisation={"epochs": 3}, evaluation={"every_epochs": 2})
    train(config, tmp_path / "run")
    assert [r["epoch"] for r in records(tmp_path / "run", "evaluation")] == [2, 3]


@pytest.mark.parametrize(
    ("run", "evaluation", "optimisation", "expected"),
    [
        ({"checkpoint_every_steps": 3, "checkpoint_every_epochs": 9}, {}, {}, [3, 6, 9, 12]),
        ({"checkpoint_every_steps": 6, "checkpoint_every_epochs": 9}, {}, {}, [6, 12]),
        ({"checkpoint_every_steps": 12, "checkpoint_every_epochs": 9}, {}, {"epochs": 3}, [12, 18]),
        ({"checkpoint_every_steps": 4}, {"every_steps": 3}, {}, [4, 6, 8, 12]),
        (
            {"checkpoint_every_steps": 2, "checkpoint_every_epochs": 2},
            {"every_steps": 2, "every_epochs": 5},
            {"epochs": None, "steps": 7},
            [2, 4, 6, 7],
        ),
        (
            {"checkpoint_every_steps": 3, "checkpoint_every_epochs": 5},
            {},
            {"accumulation": 2, "ema_decay": 0.9},
            [3, 6, 9, 12],
        ),
    ],
)
def test_every_checkpoint_that_is_asked_for_is_written(
    make_config: MakeConfig,
    tmp_path: Path,
    run: dict[str, int],
    evaluation: dict[str, int],
    optimisation: dict[str, Any],
    expected: list[int],
) -> None:
    config = make_config(
        run={"keep_checkpoints": 99, **run},
        evaluation=evaluation,
        optimisation=optimisation,
        plain=True,
    )
    train(config, tmp_path)
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == [f"step-{step:08d}" for step in expected]


def in_use() -> tuple[set[str], int, int]:
    """Threads, loading processes and open handles of this process."""
    threads = {thread.name for thread in threading.enumerate()}
    handles = len(os.listdir("/proc/self/fd"))
    return threads, len(multiprocessing.active_children()), handles


@pytest.mark.parametrize(
    "broken",
    [
        "engine.run.open_loader",
        "engine.run.build_models",
        "engine.run.Validation",
        "engine.run.resume",
        "engine.run.TrainingStep",
        "engine.step.TrainingStep._update",
        pytest.param("evaluation.evaluator._rows", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_fails_leaves_nothing_open_though_its_error_is_kept(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise Interruption

    config = make_config(optimisation={"accumulation": 2})
    if broken.endswith("_rows"):  # the teacher is evaluated, by loading processes
        data = config.data.model_copy(update={"workers": 1})
        config = config.model_copy(update={"data": data})
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    before = in_use()
    monkeypatch.setattr(f"d3etr.{broken}", fail)
    with pytest.raises(Interruption) as kept:
        train(config, tmp_path / "run")
    assert kept.tb is not None
    end = time.monotonic() + 10  # a queue's thread ends by itself, a moment later
    while not in_use()[0] <= before[0] and time.monotonic() < end:
        time.sleep(0.01)
    threads, processes, handles = in_use()
    assert threads <= before[0]
    assert processes <= before[1]
    if not broken.endswith("_rows"):  # the server of loading processes stays
        assert handles <= before[2]


def test_measurements_within_epochs_change_nothing_else(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    train(make_config(), tmp_path / "rarely")
    train(make_config(evaluation={"every_steps": 4}), tmp_path / "often")
    found = [(r["step"], r["epoch"]) for r in records(tmp_path / "often", "evaluation")]
    assert found == [(4, 1), (6, 1), (8, 2), (12, 2)]
    assert losses(tmp_path / "often") == losses(tmp_path / "rarely")


def test_bfloat16_follows_float32_roughly(make_config: MakeConfig, tmp_path: Path) -> None:
    for precision in ("float32", "bfloat16"):
        config = make_config(
            optimisation={"steps": 4, "epochs": None, "precision": precision},
            detector={"dropout": 0.0},
        )
        train(config, tmp_path / precision)
    exact, reduced = losses(tmp_path / "float32"), losses(tmp_path / "bfloat16")
    assert reduced == pytest.approx(exact, rel=0.1)
    assert reduced != exact


@pytest.mark.parametrize(("teachers", "warns"), [(0.0, True), (0.9, False)])
def test_a_teacher_that_does_not_lead_is_named_with_both_numbers(
    make_config: MakeConfig, scenes: DataConfig, tmp_path: Path, teachers: float, warns: bool
) -> None:
    path = tmp_path / "teacher.safetensors"
    digest = open_split(scenes, "validation").digest
    write_teacher(path, scenes, evaluation={"data_digest": digest, "mAP": teachers})
    config = make_config(optimisation={"epochs": 1})
    config = config.model_copy(update={"teacher": TeacherConfig(weights=path)})
    student = train(config, tmp_path / "run")["mAP"]
    journal = read_journal(tmp_path / "run" / "journal.jsonl")
    found = [r["text"] for r in journal if r["kind"] == "message" and r["level"] == "warning"]
    assert len(found) == 2 * warns, "at the first evaluation, and at the end"
    for text in found:
        assert "the teacher does not lead" in text
        assert "reaches 0.0 mAP" in text and f"the student {100 * student:.1f}" in text


def test_a_run_says_what_it_cost_in_cpu_seconds(make_config: MakeConfig, tmp_path: Path) -> None:
    begun = time.process_time()
    summary = train(make_config(plain=True), tmp_path / "run")
    spent = time.process_time() - begun
    assert 0 < summary["training_cpu_seconds"] < spent, "evaluations are left out"
    assert "training_device_seconds" not in summary, "there is no GPU"
    last = read_journal(tmp_path / "run" / "journal.jsonl")[-1]
    assert last["metrics"]["training_cpu_seconds"] == summary["training_cpu_seconds"]


def test_costs_of_a_run_that_was_interrupted_add_up(
    make_config: MakeConfig, tmp_path: Path, interrupt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(plain=True)
    interrupted_run(config, tmp_path / "run", monkeypatch, interrupt, TrainingStep, "__call__", 9)
    costs = [
        record["metrics"]["time/training_cpu_seconds"]
        for record in read_journal(tmp_path / "run" / "journal.jsonl")
        if record["kind"] == "step"
    ]
    assert costs == sorted(costs) and len(set(costs)) == len(costs) == 12
