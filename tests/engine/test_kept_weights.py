"""Which weights a run keeps, and what its journal says about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import MakeConfig, records

from d3etr.engine.distributed import SingleProcess
from d3etr.engine.run import run_training
from d3etr.evaluation.evaluator import Evaluation, Evaluator


@pytest.mark.parametrize(("keep", "kept"), [("best", [0.5, 0.5]), ("last", [0.5, 0.25])])
def test_every_evaluation_says_how_good_the_kept_weights_are(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keep: str,
    kept: list[float],
) -> None:
    measure, found = Evaluator.measure, [0.5, 0.25]

    def measured(*arguments: Any) -> Evaluation:
        evaluation = measure(*arguments)
        assert evaluation.metrics is not None
        mAP = found[len(records(tmp_path / "run", "evaluation"))]
        metrics = replace(evaluation.metrics, values=evaluation.metrics.values | {"mAP": mAP})
        return replace(evaluation, mAP=mAP, metrics=metrics)

    monkeypatch.setattr(Evaluator, "measure", measured)
    config = make_config(plain=True, evaluation={"keep": keep})
    summary = run_training(config, tmp_path / "run", SingleProcess(torch.device("cpu")))
    evaluations = [record["metrics"] for record in records(tmp_path / "run", "evaluation")]
    assert [metrics["val/mAP"] for metrics in evaluations] == [0.5, 0.25]
    assert [metrics["val/kept_mAP"] for metrics in evaluations] == kept
    assert summary["mAP"] == kept[-1]
