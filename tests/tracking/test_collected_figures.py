"""From a run folder to its pictures, with real data, weights and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tracked_folders import TINY, journal_records, write_journal, write_weights

from d3etr.config.tree import Config
from d3etr.data.splits import open_split
from d3etr.detectors.build import build_detector
from d3etr.tracking.figures.collect import draw_figures
from d3etr.tracking.figures.look import choose_images, look_at, look_for

MakeConfig = Callable[..., Config]


def classes_of(config: Config) -> tuple[tuple[int, str], ...]:
    return tuple((one.id, one.name) for one in open_split(config.data, "validation").categories)


def test_a_distilled_run_shows_everything(make_config: MakeConfig, tmp_path: Path) -> None:
    teacher, run_dir = tmp_path / "teacher.safetensors", tmp_path / "run"
    run_dir.mkdir()
    config = make_config(teacher={"weights": str(teacher)}, distillation={"method": "d3etr"})
    write_weights(teacher, seed=1, classes=classes_of(config))
    write_weights(run_dir / "weights.safetensors", classes=classes_of(config))
    measured = {"kind": "teacher", "step": 0, "time": 1e9, "metrics": {"teacher/mAP": 0.6}}
    write_journal(run_dir, [measured, *journal_records(20)])
    drawn = draw_figures(config, run_dir, tmp_path / "figures")
    assert [path.name for path in drawn] == [
        "predictions.png",
        "attention.png",
        "precision_recall.png",
        "matching_stability.png",
    ]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(
        path.name for path in drawn
    )


def test_a_look_is_the_attention_of_the_query_with_the_best_score_on_the_object(
    make_config: MakeConfig,
) -> None:
    config = make_config()
    split = open_split(config.data, "validation")
    record = choose_images(split, 1)[0]
    labels, boxes = record.objects()
    label, box = int(labels[0]), boxes[0]
    torch.manual_seed(0)
    detector = build_detector(TINY, len(split.categories)).eval()
    [outputs] = look_at(detector, split, [record], config.data).values()
    # Every query is put on the object; query 3 is the surest of its class.
    relative = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, *(box[2:] - box[:2])])
    outputs.boxes_cxcywh[-1, 0] = torch.as_tensor(relative / record.width)
    outputs.logits[-1, 0] = -1.0
    outputs.logits[-1, 0, 3, label] = 2.0
    look = look_for(outputs, record, label, box)
    assert look is not None and look.score == pytest.approx(1 / (1 + np.exp(-2.0)))
    assert look.box_xyxy == pytest.approx(box, abs=1e-3)
    expected = outputs.cross_attention[-1, 0, :, 3].mean(0).reshape(outputs.levels[0])
    assert look.attention == pytest.approx(expected.numpy())
    assert look.attention.sum() == pytest.approx(1.0)
    assert look_for(outputs, record, (label + 1) % 10, box + 1000.0) is None
