"""How the teacher's forward passes run in training: their precision, and whether they run."""

from pathlib import Path

import pytest
import torch
from tiny_runs import MakeConfig, losses

from d3etr.config.distillation import MethodConfig
from d3etr.config.tree import Config
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.journal import read_journal
from d3etr.engine.run import run_training


def train(config: Config, run_dir: Path) -> None:
    run_training(config, run_dir, SingleProcess(torch.device("cpu")))


def test_a_teacher_in_lower_precision_teaches_nearly_the_same(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    train(make_config(), tmp_path / "exact")
    train(make_config(teacher={"precision": "bfloat16"}), tmp_path / "rounded")
    exact, rounded = (losses(tmp_path / name) for name in ("exact", "rounded"))
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.05)


def test_a_control_that_never_asks_the_teacher_says_what_has_no_effect(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    off = {"weight": 0.0}
    control = MethodConfig.parse(
        {
            "method": "d3etr",
            "auxiliary_group": {"queries": "random", "assignment": "own"},
            **dict.fromkeys(("prediction", "self_attention", "cross_attention"), off),
        }
    )
    config = make_config(teacher={"precision": "bfloat16"})
    train(config.model_copy(update={"distillation": control}), tmp_path / "run")
    messages = [r for r in read_journal(tmp_path / "run" / "journal.jsonl") if "text" in r]
    texts = [message["text"] for message in messages if message["level"] == "warning"]
    assert any(text.startswith("teacher.precision has no effect") for text in texts)
