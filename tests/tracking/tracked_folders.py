"""Run folders as training leaves them, made of synthetic records and random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from tiny import tiny_detector_config

from d3etr.config.tree import Config
from d3etr.detectors.build import build_detector
from d3etr.detectors.weights import WeightsInfo, save_weights
from d3etr.tracking.state import read_state

CLASSES = ((1, "cat"), (3, "dog"))
TINY = tiny_detector_config()


def client_of(config: Config) -> MlflowClient:
    """Of the embedded database next to the run."""
    return MlflowClient(tracking_uri=f"sqlite:///{config.run.output / 'mlflow.db'}")


def run_of(config: Config, folder: Path) -> Run:
    """The MLflow run of a run's or sweep's folder."""
    state = read_state(folder)
    assert state is not None
    return client_of(config).get_run(state.run_id)


def journal_records(steps: int, final: float = 0.25) -> list[dict[str, Any]]:
    """Two step records per epoch of ten steps and an evaluation at its end."""
    records: list[dict[str, Any]] = [{"kind": "start", "step": 0, "time": 1e9, "steps": steps}]
    for step in range(5, steps + 1, 5):
        metrics = {"train/loss": 10.0 / step, "time/images_per_second": 50.0}
        records.append({"kind": "step", "step": step, "time": 1e9 + step, "metrics": metrics})
        if step % 10 == 0:
            share = step / steps
            mAP = final * share
            measured = {"val/mAP": mAP, "val/kept_mAP": mAP, "val/AP/cat": 0.1, "epoch": step // 10}
            records.append(
                {"kind": "evaluation", "step": step, "time": 1e9 + step, "metrics": measured}
            )
    return records


def write_journal(folder: Path, records: list[dict[str, Any]]) -> None:
    """The journal with these records."""
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "journal.jsonl").write_text("".join(lines), encoding="utf-8")


def write_weights(
    path: Path,
    mAP: float = 0.25,
    seed: int = 0,
    classes: tuple[tuple[int, str], ...] = CLASSES,
) -> None:
    """A tiny detector with random weights."""
    torch.manual_seed(seed)
    evaluation = {"split": "validation", "data_digest": "d" * 64, "mAP": mAP}
    config = {"normalisation": "per_image", "shortest_side": None, "longest_side": None}
    info = WeightsInfo.model_validate_json(
        json.dumps(
            {
                "detector": TINY.model_dump(mode="json"),
                "categories": classes,
                "preprocessing": config,
                "evaluation": evaluation,
                "origin": {},
            }
        )
    )
    save_weights(path, build_detector(TINY, len(classes)), info)
