from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import write_teacher

from d3etr.config.data import DataConfig, PreprocessingConfig
from d3etr.config.detector import TeacherConfig
from d3etr.config.training import EvaluationConfig
from d3etr.data.splits import open_split
from d3etr.detectors.weights import load_weights, read_info
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.teacher import check_same_classes, check_same_input, qualify_teacher
from d3etr.errors import UserError
from d3etr.evaluation.evaluator import Evaluator


@pytest.fixture
def evaluator(scenes: DataConfig) -> Evaluator:
    context = SingleProcess(torch.device("cpu"))
    return Evaluator(open_split(scenes, "validation"), scenes, EvaluationConfig(), context)


def qualify(path: Path, data: DataConfig, evaluator: Evaluator, **settings: object) -> object:
    teacher, info = load_weights(path)
    config = TeacherConfig(weights=path, **settings)  # type: ignore[arg-type]
    return qualify_teacher(teacher, info, config, data, evaluator)


def test_a_recorded_evaluation_of_the_same_data_counts(
    tmp_path: Path, scenes: DataConfig, evaluator: Evaluator
) -> None:
    path = tmp_path / "teacher.safetensors"
    write_teacher(path, scenes, evaluation={"data_digest": evaluator.split.digest, "mAP": 0.61})
    assert qualify(path, scenes, evaluator, minimum_mAP=0.6) == (0.61, "recorded")


@pytest.mark.parametrize("case", ["other data", "no record", "asked to measure", "other size"])
def test_otherwise_the_teacher_is_measured(
    tmp_path: Path, scenes: DataConfig, evaluator: Evaluator, case: str
) -> None:
    path = tmp_path / "teacher.safetensors"
    digest = "0" * 64 if case == "other data" else evaluator.split.digest
    record = None if case == "no record" else {"data_digest": digest, "mAP": 0.61}
    size = 48 if case == "other size" else None
    preprocessing = scenes.preprocessing.model_copy(update={"shortest_side": size})
    write_teacher(path, scenes, evaluation=record, preprocessing=preprocessing)
    how = "measure" if case == "asked to measure" else "verify"
    mAP, known = qualify(path, scenes, evaluator, evaluation=how)  # type: ignore[misc]
    assert known == "measured" and mAP < 0.2


def test_a_teacher_below_the_minimum_stops_with_the_numbers(
    tmp_path: Path, scenes: DataConfig, evaluator: Evaluator
) -> None:
    path = tmp_path / "teacher.safetensors"
    write_teacher(path, scenes, evaluation={"data_digest": evaluator.split.digest, "mAP": 0.318})
    with pytest.raises(UserError, match=r"31\.8 mAP \(recorded\).* below .*minimum_mAP 50\.0"):
        qualify(path, scenes, evaluator, minimum_mAP=0.5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda c: [(1, "apple"), *c[1:]],
            "only the teacher has 'apple'; only the data has '0'.*import-weights --categories",
        ),
        (
            lambda c: [*c[:2], c[5], *c[3:5], c[2], *c[6:]],
            "another order: class 2 is '5' there and '2' here",
        ),
        (lambda c: [(identity + 100, name) for identity, name in c], None),
    ],
    ids=["other names", "another order", "other ids are fine"],
)
def test_other_classes_are_named(
    tmp_path: Path, scenes: DataConfig, change: Callable[[Any], Any], text: str | None
) -> None:
    path, split = tmp_path / "teacher.safetensors", open_split(scenes, "train")
    theirs = change([(c.id, c.name) for c in split.categories])
    write_teacher(path, scenes, categories=tuple(theirs))
    with nullcontext() if text is None else pytest.raises(UserError, match=text):
        check_same_classes(read_info(path), path, split)


def test_another_normalisation_is_refused(tmp_path: Path, scenes: DataConfig) -> None:
    path = tmp_path / "teacher.safetensors"
    write_teacher(path, scenes, preprocessing=PreprocessingConfig(normalisation="imagenet"))
    with pytest.raises(UserError, match="expects images with normalisation 'imagenet'"):
        check_same_input(read_info(path), path, scenes)
