import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from d3etr.config.load import to_yaml
from d3etr.config.tree import Config
from d3etr.engine.find_run import folder_of
from d3etr.engine.journal import read_journal
from d3etr.errors import UserError
from d3etr.launch.api import launch
from d3etr.launch.ray_environment import package_environment

MakeConfig = Callable[..., Config]


def losses(run_dir: Path) -> dict[int, float]:
    records = [r for r in read_journal(run_dir / "journal.jsonl") if r["kind"] == "step"]
    return {record["step"]: record["metrics"]["train/loss"] for record in records}


def torchrun(repository: Path, config: Config) -> subprocess.CompletedProcess[str]:
    config.run.output.mkdir(parents=True, exist_ok=True)
    recipe = config.run.output / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    script = str(repository / "trainers" / "run.py")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*start, script, str(recipe), "--launcher", "torchrun"],
        env=os.environ | package_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_torchrun_its_launcher_says_how_to_start(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="torchrun --nproc-per-node N"):
        launch(make_config(), launcher="torchrun", quiet=True)


@pytest.mark.slow
def test_two_workers_of_torchrun_give_the_losses_of_one_process(
    make_config: MakeConfig, repository: Path, tmp_path: Path
) -> None:
    alone = launch(make_config(f"run.output={tmp_path / 'alone'}"), launcher="local", quiet=True)
    ended = torchrun(repository, make_config())
    assert ended.returncode == 0, ended.stderr
    run_dir = folder_of(make_config()).path
    assert losses(run_dir) == pytest.approx(losses(alone.run_dir), rel=1e-4)
    assert json.loads((run_dir / "summary.json").read_text())["mAP"] == pytest.approx(
        alone.metrics["mAP"], abs=1e-4
    )
    assert ended.stderr.count("epoch 3/3") == 1  # only rank 0 speaks
    assert torchrun(repository, make_config()).returncode == 0  # finished: nothing to wait for
