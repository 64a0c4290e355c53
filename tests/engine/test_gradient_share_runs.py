"""Runs in which distillation's weight follows its share of the gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_graphs import plain_pass
from test_workers import BATCH_NORM, train_alone, train_with_two_workers
from tiny_runs import MakeConfig, assert_identical, final_state, losses, values

from d3etr.config.distillation import MethodConfig
from d3etr.config.tree import Config
from d3etr.engine.graphs import StepGraphs
from d3etr.engine.journal import read_journal
from d3etr.engine.step import TrainingStep
from d3etr.methods.gradient_share import GradientShare
from d3etr.structures import ImageBatch, Targets


def steered(config: Config, **settings: Any) -> Config:
    share = {"target": 0.3, "tolerance": 0.0} | settings
    method = MethodConfig.parse({"method": "d3etr", "gradient_share": share})
    return config.model_copy(update={"distillation": method})


def changes(run_dir: Path) -> list[str]:
    texts = [r.get("text", "") for r in read_journal(run_dir / "journal.jsonl")]
    return [text for text in texts if text.startswith("distillation.gradient_share: ")]


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_measuring_leaves_no_trace(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    """Random numbers, gradients, statistics and records are those of a run that measures none."""
    monkeypatch.setattr("d3etr.methods.gradient_share.EVERY", 1)
    trained = BATCH_NORM | {"optimisation": {"epochs": 1}}
    config = make_config(**(trained if norm == "batch" else {}))
    train_alone(config, tmp_path / "plain")
    train_alone(steered(config, tolerance=0.99), tmp_path / "measured")
    assert losses(tmp_path / "measured") == losses(tmp_path / "plain")
    measured, plain = (final_state(tmp_path / x)["model"] for x in ("measured", "plain"))
    assert measured.keys() - plain.keys() == {"share.factor", "share.seen"}
    assert_identical({name: measured[name] for name in plain}, {**plain})


def test_the_weight_follows_the_gradients_of_the_whole_batch(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    for accumulation in (1, 2):
        config = make_config(optimisation={"accumulation": accumulation}, detector={"dropout": 0.0})
        train_alone(steered(config), tmp_path / str(accumulation))
    train_alone(config, tmp_path / "unsteered")
    one, two, unsteered = (losses(tmp_path / name) for name in ("1", "2", "unsteered"))
    assert two == pytest.approx(one, rel=1e-5) and changes(tmp_path / "1") == changes(
        tmp_path / "2"
    )
    first = changes(tmp_path / "1")[0]
    assert "distillation has " in first and " % of the gradient: the weight is now x " in first
    # A tenth of the twelve steps, rounded up.
    assert one[:2] == pytest.approx(unsteered[:2], rel=1e-5) and one[2] != pytest.approx(
        unsteered[2], rel=1e-3
    )


def test_a_run_of_one_epoch_is_steered_and_ends_with_the_recipes_weight(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(optimisation={"epochs": 1}, detector={"dropout": 0.0})
    train_alone(steered(config, until=0.5), tmp_path / "steered")
    texts = changes(tmp_path / "steered")
    assert len(texts) == 2 and texts[1].endswith("the weight is the recipe's again")
    assert final_state(tmp_path / "steered")["model"]["share.factor"] == 1
    train_alone(config, tmp_path / "unsteered")
    one, other = (values(tmp_path / x, "train/adaptive/class") for x in ("steered", "unsteered"))
    ratios = [x / y for x, y in zip(one, other, strict=True)]
    factor = float(texts[0].rpartition(" x ")[2])
    assert factor < 0.5 and ratios == pytest.approx([1.0, factor, factor, 1.0, 1.0, 1.0], rel=0.3)


@pytest.mark.parametrize("method", ["feature_cosine", "d3etr"])
def test_steps_of_the_warm_up_are_not_watched(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("d3etr.methods.gradient_share.EVERY", 1)
    watch, update, steps = GradientShare.watch, TrainingStep._update, []
    watched: list[int] = []

    def counted(self: TrainingStep, step: int) -> None:
        steps.append(step)
        update(self, step)

    def seen(self: GradientShare, *given: Any) -> None:
        watched.append(len(steps))  # the step that is not updated yet
        watch(self, *given)

    monkeypatch.setattr(TrainingStep, "_update", counted)
    monkeypatch.setattr(GradientShare, "watch", seen)
    share = {"gradient_share": {"target": 0.3, "until": 1.0}}
    settings = {"method": method, "warmup_steps": 3, "every_steps": 2} | share
    config = make_config(optimisation={"epochs": 1})
    distillation = MethodConfig.parse(settings)
    train_alone(config.model_copy(update={"distillation": distillation}), tmp_path / "run")
    assert steps == [*range(6)] and watched == [4]


@pytest.mark.slow
def test_two_workers_steer_alike(make_config: MakeConfig, tmp_path: Path) -> None:
    config = steered(make_config(detector={"dropout": 0.0}))
    train_alone(config, tmp_path / "one")
    train_with_two_workers(config, tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert changes(tmp_path / "two") == changes(tmp_path / "one") != []


class Unrecorded(StepGraphs):
    """Leaves gradients where graphs leave them, on any device."""

    def __init__(self, run: Any, parameters: Any, device: torch.device, buffers: Any = ()) -> None:
        self._run, self._parameters = run, parameters
        self._gradients, self._factor = {}, torch.ones(())

    def __call__(
        self, images: ImageBatch, targets: Targets, factor: float, seed: Any, *, distils: bool
    ) -> Any:
        self._factor.fill_(factor)
        seed()
        return self._pass(images, targets, distils)


def test_graphs_give_the_gradients_of_detection_too(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimisation = {"precision": "bfloat16", "cuda_graphs": True}
    config = steered(make_config(optimisation=optimisation))
    train_alone(config, tmp_path / "eager")
    monkeypatch.setattr("d3etr.engine.step.TrainingStep.unsupported_reason", lambda _: None)
    monkeypatch.setattr("d3etr.engine.step.StepGraphs", Unrecorded)
    monkeypatch.setattr("d3etr.engine.step.whole_pass", lambda part, *_: plain_pass(part))
    train_alone(config, tmp_path / "graphs")
    assert losses(tmp_path / "graphs") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
    assert changes(tmp_path / "graphs") == changes(tmp_path / "eager") != []
