"""The same run under one process, accumulation, two gloo workers, and after a SIGKILL."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import changed, save_untrained
from tiny_runs import MakeConfig, assert_same_run, final_state, losses, records, values

from d3etr.config.distillation import MethodConfig
from d3etr.config.tree import Config
from d3etr.detectors.batch_norm import BatchNorm2d
from d3etr.engine.distributed import SingleProcess, Torchrun
from d3etr.engine.journal import read_journal
from d3etr.engine.run import run_training
from d3etr.engine.step import _require_equal_shares
from d3etr.errors import UserError

WORKER = """
import sys
from pathlib import Path
from d3etr.config.tree import Config
from d3etr.engine.distributed import SingleProcess, Torchrun
from d3etr.engine.run import run_training
from d3etr.engine.run_folder import RunFolder
config = Config.model_validate_json(Path(sys.argv[1]).read_text())
if sys.argv[3] == "alone":
    run_training(config, Path(sys.argv[2]), SingleProcess())
else:
    with Torchrun(timeout_seconds=60) as context:
        run_training(config, Path(sys.argv[2]), context)
"""


def start(
    config: Config, run_dir: Path, rank: int | None = None, port: int = 0
) -> subprocess.Popen:
    """One worker process; rank None for one that is alone."""
    file = run_dir.parent / f"{run_dir.name}.json"
    file.write_text(config.model_dump_json())
    platform = Path(__file__).resolve().parents[2] / "platform"
    environment = os.environ | {
        "PYTHONPATH": str(platform),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    mode = "alone"
    if rank is not None:
        mode = "together"
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    command = [sys.executable, "-c", WORKER, str(file), str(run_dir), mode]
    return subprocess.Popen(command, env=environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train_with_two_workers(config: Config, run_dir: Path) -> None:
    port = free_port()
    workers = [start(config, run_dir, rank, port) for rank in range(2)]
    assert [worker.wait(timeout=180) for worker in workers] == [0, 0]


def train_alone(config: Config, run_dir: Path) -> None:
    run_training(config, run_dir, SingleProcess(torch.device("cpu")))


@pytest.mark.slow
def test_accumulation_does_not_change_the_losses(make_config: MakeConfig, tmp_path: Path) -> None:
    for accumulation in (1, 2, 4):
        # At a small rate: Adam's first steps are signs, which rounding turns where a gradient is 0.
        optimisation = {"accumulation": accumulation, "learning_rate": 1e-4}
        config = make_config(optimisation=optimisation, detector={"dropout": 0.0})
        train_alone(config, tmp_path / str(accumulation))
    # Adam would not notice gradients that were all too large, so their norms are compared too.
    for name in ("train/loss", "optimiser/gradient_norm"):
        one, two, four = (values(tmp_path / part, name) for part in ("1", "2", "4"))
        assert two == pytest.approx(one, rel=1e-6), name
        assert four == pytest.approx(one, rel=1e-6), name


@pytest.mark.slow
def test_general_points_of_a_two_stage_teacher_are_those_of_its_images(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    kind = {"name": "deformable_detr", "levels": 2, "points": 2}
    two_stage = kind | {"box_refinement": True, "two_stage": True, "dropout": 0.0}
    base = make_config(detector={"dropout": 0.0})
    detector = changed(base.student.detector, **two_stage)
    save_untrained(tmp_path / "teacher.safetensors", detector, base.data)
    distillation = MethodConfig.parse({"method": "kd_detr", "general_points": {"count": 5}})
    for accumulation in (1, 2):
        config = make_config(
            optimisation={"accumulation": accumulation, "epochs": 1},
            detector={"dropout": 0.0},
            teacher={"weights": tmp_path / "teacher.safetensors"},
        ).model_copy(update={"distillation": distillation})
        train_alone(config, tmp_path / str(accumulation))
    for name in ("train/general/l1", "train/loss"):
        one, two = (values(tmp_path / part, name) for part in ("1", "2"))
        assert two == pytest.approx(one, rel=1e-5), name


@pytest.mark.slow
def test_two_workers_have_the_losses_of_one(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(detector={"dropout": 0.0}, evaluation={"test": True})
    train_alone(config, tmp_path / "one")
    train_with_two_workers(config, tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for alone, together in zip(
        records(tmp_path / "one", "evaluation"),
        records(tmp_path / "two", "evaluation"),
        strict=True,
    ):
        assert together["metrics"] == pytest.approx(alone["metrics"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "detector",
    [{"decoder_layers": 1}, {"name": "detr", "classification": "softmax", "encoder_layers": 0}],
    ids=["one-decoder-layer", "softmax"],
)
def test_every_student_trains_on_two_workers_as_on_one(
    detector: dict[str, Any], make_config: MakeConfig, tmp_path: Path
) -> None:
    settings = {"dropout": 0.0} | detector
    config = make_config(optimisation={"epochs": 1}, detector=settings)
    train_alone(config, tmp_path / "one")
    train_with_two_workers(config, tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_with_dropout_two_workers_equal_two_micro_batches(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    train_alone(make_config(optimisation={"accumulation": 2}), tmp_path / "accumulated")
    train_with_two_workers(make_config(), tmp_path / "two")
    train_with_two_workers(make_config(optimisation={"accumulation": 2}), tmp_path / "both")
    expected = losses(tmp_path / "accumulated")
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-5)
    assert losses(tmp_path / "both") != pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_run_may_go_on_with_another_number_of_workers(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    settings = {"detector": {"dropout": 0.0}, "run": {"checkpoint_every_steps": 4}}
    train_alone(make_config(**settings), tmp_path / "whole")
    train_alone(make_config(**settings), tmp_path / "run")
    run_dir = tmp_path / "run"
    (run_dir / "summary.json").unlink()
    for file in (run_dir / "checkpoints" / "step-00000012").iterdir():
        file.unlink()
    (run_dir / "checkpoints" / "step-00000012").rmdir()
    assert final_state(run_dir)["step"] == 8
    train_with_two_workers(make_config(**settings), run_dir)
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
def test_a_killed_process_is_resumed_bit_for_bit(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(optimisation={"epochs": 6})
    whole = start(config, tmp_path / "whole")
    assert whole.wait(timeout=180) == 0
    run_dir = tmp_path / "killed"
    worker = start(config, run_dir)
    deadline = time.monotonic() + 120
    # A checkpoint is written beside the training: it may come after the steps that follow it.
    while not (
        any(record["step"] >= 8 for record in read_journal(run_dir / "journal.jsonl"))
        and list(run_dir.glob("checkpoints/step-*"))
    ):
        assert time.monotonic() < deadline and worker.poll() is None
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    assert not (run_dir / "summary.json").exists()
    again = start(config, run_dir)
    assert again.wait(timeout=180) == 0
    assert_same_run(run_dir, tmp_path / "whole")
    starts = [r["step"] for r in read_journal(run_dir / "journal.jsonl") if r["kind"] == "start"]
    assert len(starts) == 2 and starts[1] >= 6


BATCH_NORM = {
    "detector": {"dropout": 0.0, "backbone": {"name": "resnet18vd", "norm": "batch"}},
    # Low: of a gradient near zero, Adam's step has a sign that rounding decides.
    "optimisation": {"epochs": 1, "ema_decay": 0.9, "learning_rate": 1e-5},
}
"""A run of six steps whose backbone's statistics are trained."""


def running(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if "running_" in name}


@pytest.mark.slow
def test_batch_norm_is_over_all_workers(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(**BATCH_NORM)
    train_alone(config, tmp_path / "one")
    train_with_two_workers(config, tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (final_state(tmp_path / name) for name in ("one", "two"))
    for part in ("model", "average"):
        assert len(running(one[part])) == 2 * 23
        for name, expected in running(one[part]).items():
            torch.testing.assert_close(running(two[part])[name], expected, rtol=0.01, atol=1e-3)
    # The file holds the average that was evaluated.
    kept = load_file(tmp_path / "two" / "weights.safetensors")
    averaged, own = two["average"], two["model"]
    for name in running(kept):
        assert torch.equal(kept[name], averaged[name])
        assert not torch.equal(kept[name], own[f"student.{name}"])


@pytest.mark.slow
def test_batch_norm_goes_on_where_it_stood(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(**BATCH_NORM, run={"checkpoint_every_steps": 3})
    train_alone(config, tmp_path / "whole")
    run_dir = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", run_dir)
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    assert final_state(run_dir)["step"] == 3
    train_alone(config, run_dir)
    assert_same_run(run_dir, tmp_path / "whole")


def test_batch_norm_needs_equal_shares() -> None:
    norm = BatchNorm2d(3)
    _require_equal_shares(norm, 4, 2)
    _require_equal_shares(torch.nn.Linear(1, 1), 3, 2)
    with pytest.raises(UserError, match="3 micro-batches cannot be shared equally by 2"):
        _require_equal_shares(norm, 3, 2)
    _require_equal_shares(norm.requires_grad_(False), 3, 2)


def test_torchrun_without_torchrun_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="torchrun --nproc-per-node N"):
        Torchrun()
