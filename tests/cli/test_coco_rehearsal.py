"""The twelve-epoch COCO recipe from its first command to its last, on a COCO of 21 images."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_recipes import RECIPES, write_coco
from official_checkpoints import HEADS, D, F, official_state, resnet18_state

from d3etr.cli.main import main
from d3etr.engine.journal import read_journal

RECIPE = RECIPES / "conditional-r50"
SIZES = {"width": D, "heads": HEADS, "encoder_layers": 2, "decoder_layers": 3, "feedforward": F}
# The official checkpoint's sizes, and images that take no time. Epochs, schedule, batch size,
# augmentation, criterion and method are the recipe's.
SHORTER = (
    "student.detector.backbone.name=resnet18",
    *(f"student.detector.{key}={value}" for key, value in SIZES.items()),
    "student.backbone_weights=backbone.safetensors",
    "data.preprocessing={shortest_side: 64, longest_side: 96}",
    "data.augmentation.shortest_sides=[32, 48, 64]",
    "data.workers=0",
    "student.detector.queries=40",
    "cluster={workers: 1, gpus_per_worker: 0}",
    "tracking={enabled: false}",
)


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with COCO where the recipe looks for it and weights to import."""
    monkeypatch.chdir(tmp_path)
    write_coco(Path("data/coco"), 21, 8)
    state = official_state("conditional_detr", 91)
    torch.save({"model": state, "args": Namespace(nheads=HEADS, dilation=False)}, "teacher.pth")
    torch.save(resnet18_state(), "backbone.pth")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints as JSON."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def train(capsys: pytest.CaptureFixture[str], name: str, *more: str) -> Any:
    sets = [
        f"--set={text}" for text in (*SHORTER, *more) if name == "d3etr" or "teacher" not in text
    ]
    return run(capsys, "train", str(RECIPE / f"{name}.yaml"), *sets, "--launcher", "local")


@pytest.mark.slow
def test_every_command_of_the_real_run(somewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = "trainers/weights/coco-conditional-r101.safetensors"
    imported = run(capsys, "import-weights", "teacher.pth", weights)
    assert len(imported["categories"]) == 80
    run(capsys, "import-weights", "backbone.pth", "backbone.safetensors")
    sets = [f"--set={text}" for text in SHORTER]
    found = run(capsys, "check-data", str(RECIPE / "d3etr.yaml"), *sets)
    assert found["ok"] and [split["images"] for split in found["splits"]] == [21, 8]

    place = ("--annotations", "data/coco/annotations/instances_val2017.json", "--workers", "0")
    measured = run(capsys, "evaluate", weights, "--images", "data/coco/val2017", *place)

    plain, taught = train(capsys, "plain"), train(capsys, "d3etr", "teacher.minimum_mAP=0")
    steps = [
        r for r in read_journal(Path(taught["run_dir"]) / "journal.jsonl") if r["kind"] == "step"
    ]
    assert steps[-1]["step"] == 12
    assert steps[-1]["metrics"]["optimiser/learning_rate"] == pytest.approx(1e-5)
    assert taught["metrics"]["teacher/mAP"] >= 0

    compared = run(capsys, "compare", plain["run_dir"], taught["run_dir"])
    assert compared
    after = run(capsys, "evaluate", taught["weights"], "--images", "data/coco/val2017", *place)
    assert after["metrics"]["mAP"] == pytest.approx(taught["metrics"]["mAP"])
    assert measured["data_digest"] == after["data_digest"]
    run(capsys, "export", taught["weights"], "small.safetensors", "--half")
    picture = "data/coco/val2017/000000000009.jpg"
    run(capsys, "predict", "small.safetensors", picture, "--threshold", "0", "--output", "boxes")
