"""A few real steps of every method that a teacher's network teaches by."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.test_views import taught_by
from tiny_runs import MakeConfig, losses, values

from d3etr.config.distillation import MethodConfig
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.run import run_training
from d3etr.registry import METHODS

TAUGHT = [name for name in METHODS.built_in if MethodConfig.parse({"method": name}).needs_network]
CASES: dict[str, dict[str, Any]] = {name: {"method": name} for name in TAUGHT} | {
    "d3etr, summed maps": {"cross_attention": {"distance": "mse", "queries": "summed"}},
    "d3etr, refined teacher": {"refine_teacher": True},
    "qskd, refined teacher": {"method": "qskd", "refine_teacher": True},
}
STRONG = {"foreground_weight": 1e-2, "background_weight": 1e-3}
"""Weights of CLoCKDistill's memory for 32 channels and 16 tokens."""


@pytest.mark.parametrize("case", CASES)
def test_a_tiny_run_learns_from_its_teacher(
    make_config: MakeConfig, tmp_path: Path, case: str
) -> None:
    settings = {"method": "d3etr"} | CASES[case]
    settings |= STRONG if case == "clockdistill" else {}
    sections = {
        "optimisation": {"epochs": 4, "learning_rate": 3e-3},
        "evaluation": {"every_epochs": 100},
    }
    if case == "distribution":  # for detectors that refine distributions of edges
        config = taught_by("d_fine", make_config, tmp_path, **sections)
    else:
        config = make_config(detector={"dropout": 0.0}, **sections)
    config = config.model_copy(update={"distillation": MethodConfig.parse(settings)})
    run_training(config, tmp_path / "run", SingleProcess(torch.device("cpu")))
    total = losses(tmp_path / "run")
    assert len(total) == 24 and sum(total[-6:]) < 0.97 * sum(total[:6])
    for name in ("memory/foreground", "targets/l1") if case == "clockdistill" else ():
        term = values(tmp_path / "run", f"train/{name}")
        assert sum(term[-6:]) < 0.9 * sum(term[:6]), name
