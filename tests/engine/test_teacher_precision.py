"""How the teacher runs in training: in which precision, on how large a picture, and whether."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import MakeConfig, assert_same_run, losses, values

from d3etr.config.distillation import MethodConfig
from d3etr.config.tree import Config
from d3etr.detectors.conditional_detr import ConditionalDETR
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.journal import read_journal
from d3etr.engine.run import run_training
from d3etr.engine.step import TrainingStep
from d3etr.structures import ImageBatch, Memory


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
    config = make_config(teacher={"precision": "bfloat16", "image_scale": 2.0})
    train(config.model_copy(update={"distillation": control}), tmp_path / "run")
    messages = [r for r in read_journal(tmp_path / "run" / "journal.jsonl") if "text" in r]
    texts = [message["text"] for message in messages if message["level"] == "warning"]
    for key in ("precision", "image_scale"):
        assert any(text.startswith(f"teacher.{key} has no effect") for text in texts)


def test_a_teacher_of_a_larger_picture_is_measured_on_it_and_teaches_from_it(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Twice the size in training, in the measurement before, and in the matching's stability."""
    config = make_config(teacher={"image_scale": 2.0, "minimum_mAP": 0.0})
    seen: set[tuple[int, int]] = set()
    encode = ConditionalDETR.encode

    def watch(self: ConditionalDETR, images: ImageBatch) -> Memory:
        if self.config.queries == 8:  # the teacher
            seen.add((images.pixels.shape[2], images.pixels.shape[3]))
        return encode(self, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConditionalDETR, "encode", watch)
        train(config, tmp_path / "large")
    assert seen == {(64, 64)}
    train(make_config(), tmp_path / "equal")
    large, equal = (losses(tmp_path / name) for name in ("large", "equal"))
    assert large != equal and large == pytest.approx(equal, rel=0.5)
    detection = "train/detection/class"
    assert values(tmp_path / "large", detection)[0] == values(tmp_path / "equal", detection)[0]


@pytest.mark.parametrize("method", ["feature_cosine", "d3etr"])
def test_a_steered_weight_resumes_as_it_was(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Killed in the middle of the second epoch, a run has the same weights in the end."""
    monkeypatch.setattr("d3etr.methods.gradient_share.EVERY", 4)
    steered = {"method": method, "gradient_share": {"target": 0.1, "tolerance": 0.0}}
    changes = {"distillation": MethodConfig.parse(steered)}
    config = make_config(optimisation={"epochs": 4}, run={"checkpoint_every_steps": 4}).model_copy(
        update=changes
    )
    train(config, tmp_path / "whole")
    stop = TrainingStep.__call__

    def broken(self: TrainingStep, step: int, batches: Any) -> None:
        if step == 9:
            raise KeyboardInterrupt
        stop(self, step, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", broken)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut")
    train(config, tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    journal = read_journal(tmp_path / "whole" / "journal.jsonl")
    texts = [record["text"] for record in journal if "gradient_share" in record.get("text", "")]
    # Each third step, where anything was measured before it.
    assert len(texts) == {"feature_cosine": 8, "d3etr": 7}[method]
    assert texts[-1].endswith("the weight is the recipe's again")
