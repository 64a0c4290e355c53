"""The teacher's labels of a verdict: made once, of known files, at the best threshold."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import save_untrained, tiny_detector_config
from tiny_recipe import tiny_recipe

from d3etr.config.load import load_config
from d3etr.config.tree import Config
from d3etr.data.splits import open_split
from d3etr.errors import UserError
from d3etr.inference import load
from d3etr.pseudo_labels import best_threshold
from d3etr.verdict.contenders import PSEUDO_LABELS, make_contest, with_labels
from d3etr.verdict.labelling import Labelled, label

LARGE = tiny_detector_config(width=32, feedforward=32, queries=8, box_size_bias=0.7)
"""Finds large objects untrained: all of its boxes are."""
FITS = {"width": 32, "feedforward": 32}
UNLABELLED = ("data.labelled_share=0.5", "data.unlabelled={rest_of_train: true, share: 0.25}")


def written(folder: Path, **detector: Any) -> tuple[Path, Config, Config]:
    """A recipe, its distilled student and the one that trains on labels."""
    file, teacher = folder / "taught.yaml", folder / "teacher.safetensors"
    student = {"backbone": {"name": "small", "stem_width": 8, "stage_widths": [8, 8, 16]}}
    student |= {"heads": 2, "encoder_layers": 1, "decoder_layers": 2, "queries": 6} | detector
    scenes = {"root": str(folder / "scenes"), "train_images": 24, "validation_images": 8}
    scenes |= {"test_images": 1, "image_size": 32, "minimum_scale": 24, "maximum_scale": 30}
    file.write_text(
        tiny_recipe(
            data={"digit_scenes": scenes},
            teacher={"weights": str(teacher)},
            student={"detector": student},
            distillation={"method": "d3etr"},
        )
    )
    config = load_config(file, UNLABELLED)
    if not teacher.exists():
        save_untrained(teacher, LARGE, config.data)
    contest = make_contest(file, UNLABELLED)
    (start,) = [way.config for way in contest.ways if way.name == PSEUDO_LABELS]
    return file, config, start


def test_labels_are_made_once_at_the_best_threshold(tmp_path: Path) -> None:
    recipe, config, start = written(tmp_path, **FITS)
    file = tmp_path / "verdict" / "pseudo-labels.json"
    found = label(config, start, file)
    assert isinstance(found, Labelled)
    assert found.images == 12 and found.seconds > 0 and found.inherits
    assert config.teacher is not None and isinstance(config.teacher.weights, Path)
    teacher, validation = load(config.teacher.weights), open_split(config.data, "validation")
    assert found.threshold == best_threshold(teacher, validation)[0]
    scores = [entry["score"] for entry in json.loads(file.read_bytes())["annotations"]]
    assert len(scores) == found.boxes > 0 and min(scores) >= found.threshold

    (way,) = [
        way
        for way in with_labels(
            make_contest(recipe, UNLABELLED), recipe, UNLABELLED, file, inherits=True
        ).ways
        if way.name == PSEUDO_LABELS
    ]
    train = open_split(way.config.data, "train")
    assert len(train.records) == 24 and len(train.parts[1].objects.labels) == found.boxes

    before = file.read_bytes(), file.stat().st_mtime_ns
    assert label(config, start, file) == found
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    save_untrained(config.teacher.weights, LARGE, config.data, evaluation={"mAP": 0.5})
    with pytest.raises(UserError, match=r"teacher\.weights is not what the run in .*verdict began"):
        label(config, start, file)


def test_a_student_that_no_part_of_the_teacher_fits_starts_anew(tmp_path: Path) -> None:
    _, config, start = written(tmp_path, width=16)
    found = label(config, start, tmp_path / "labels.json")
    assert isinstance(found, Labelled) and not found.inherits


def test_a_teacher_without_a_right_detection_labels_nothing(tmp_path: Path) -> None:
    _, config, start = written(tmp_path, **FITS)
    scenes = config.data.digit_scenes
    assert scenes is not None
    empty = scenes.model_copy(update={"minimum_objects": 0, "maximum_objects": 0})
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"digit_scenes": empty})}
    )
    found = label(config, start, tmp_path / "labels.json")
    assert isinstance(found, str) and "no detection is right" in found
    assert not (tmp_path / "labels.json").exists()
