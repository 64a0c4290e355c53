"""A run that is taught by boxes in files: ours, written by ``d3etr evaluate``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import MakeConfig, assert_same_run, values

from d3etr.cli.main import main
from d3etr.config.data import DataConfig
from d3etr.config.detector import TeacherConfig
from d3etr.config.distillation import MethodConfig
from d3etr.config.load import load_config, to_yaml
from d3etr.config.tree import Config
from d3etr.data.splits import configured_splits
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.find_run import absolute_paths
from d3etr.engine.preflight import judge_beginning
from d3etr.engine.run import run_training
from d3etr.errors import UserError

Taught = Callable[..., Config]


@pytest.fixture(scope="module")
def results(scenes: DataConfig, teacher_weights: Path, tmp_path_factory: Any) -> Path:
    """The teacher's 300 best boxes on each training image (it has 80: 8 queries, 10 classes)."""
    path: Path = tmp_path_factory.mktemp("results") / "results.json"
    train = configured_splits(scenes)["train"]
    place = ["--annotations", str(train.annotations), "--images", str(train.images)]
    to = ["--write-detections", str(path)]
    assert main(["evaluate", str(teacher_weights), *place, *to, "--workers", "0"]) == 0
    return path


@pytest.fixture
def taught(make_config: MakeConfig, results: Path) -> Taught:
    def make(least: float = 0.0, **settings: Any) -> Config:
        config = make_config(**settings)
        method = MethodConfig.parse({"method": "teach_detr", "minimum_score": least})
        teacher = TeacherConfig(detections=(results,))
        return config.model_copy(update={"teacher": teacher, "distillation": method})

    return make


def train(config: Config, run_dir: Path) -> dict[str, float]:
    return run_training(config, run_dir, SingleProcess(torch.device("cpu")))


def test_the_file_has_the_best_boxes_of_every_image(results: Path) -> None:
    entries = json.loads(results.read_text())
    assert len(entries) == 24 * 80
    assert {entry["image_id"] for entry in entries} == {*range(1, 25)}
    assert all(0 <= entry["score"] <= 1 and len(entry["bbox"]) == 4 for entry in entries)


def test_a_run_learns_from_boxes_without_a_teachers_network(
    taught: Taught, scenes: DataConfig, tmp_path: Path
) -> None:
    """A teacher that finds every object, and is nearly sure."""
    truth = json.loads(Path(str(configured_splits(scenes)["train"].annotations)).read_text())
    file = tmp_path / "results.json"
    file.write_text(json.dumps([{**entry, "score": 0.9} for entry in truth["annotations"]]))
    config = taught(optimisation={"epochs": 4})
    config = config.model_copy(update={"teacher": TeacherConfig(detections=(file,))})
    summary = train(config, tmp_path / "run")
    terms = [f"train/teacher_boxes/{term}" for term in ("class", "l1", "giou")]
    losses = [sum(row) for row in zip(*(values(tmp_path / "run", t) for t in terms), strict=True)]
    assert 0 < losses[-1] < losses[0]
    assert "teacher/mAP" not in summary
    train(config, tmp_path / "again")
    assert_same_run(tmp_path / "again", tmp_path / "run")


def test_a_run_that_is_stopped_goes_on_with_the_same_files_only(
    taught: Taught, results: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "results.json"
    copy.write_bytes(results.read_bytes())
    config = taught(optimisation={"epochs": 1})
    teacher = TeacherConfig(detections=(copy,))
    config = config.model_copy(update={"teacher": teacher})
    train(config, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    copy.write_text(json.dumps(json.loads(results.read_text())[:-1]))
    with pytest.raises(UserError, match=r"teacher\.detections\[0\] is not what the run .* began"):
        train(config, tmp_path / "run")


def test_what_the_boxes_contradict_is_found_before_anything_starts(
    taught: Taught, scenes: DataConfig, tmp_path: Path
) -> None:
    config, splits = taught(), configured_splits(scenes)
    data = scenes.model_copy(
        update={"digit_scenes": None, "train": splits["train"], "validation": splits["validation"]}
    )
    config = config.model_copy(update={"data": data})
    assert judge_beginning(config).teacher is None
    file = tmp_path / "results.json"
    file.write_text('[{"image_id": 1, "category_id": 77, "bbox": [1, 1, 5, 5], "score": 0.9}]')
    with pytest.raises(UserError, match=r"classes that .* does not have: id 77"):
        teacher = TeacherConfig(detections=(file,))
        judge_beginning(config.model_copy(update={"teacher": teacher}))


def test_one_file_or_several_are_kept_with_absolute_paths(tmp_path: Path) -> None:
    for text in ("a.json", "[a.json, b.json]"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            "extends: digits/plain\n"
            f"teacher: {{detections: {text}}}\n"
            "distillation: {method: teach_detr}\n"
        )
        config = absolute_paths(load_config(recipe), tmp_path)
        assert config.teacher is not None and config.teacher.detections is not None
        assert config.teacher.detections[0] == tmp_path / "a.json"
        kept = tmp_path / "kept.yaml"
        kept.write_text(to_yaml(config))
        assert load_config(kept) == config


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("teacher: {weights: a.safetensors}", "teach_detr' needs teacher.detections"),
        (
            "teacher: {detections: a.json, weights: b}",
            "exactly one of weights, detections and features",
        ),
        ("teacher: {}", "exactly one of weights, detections and features"),
        ("teacher: {detections: a.json, precision: bfloat16}", "precision have no effect on boxes"),
        (
            "teacher: {detections: a.json}\nstudent: {detector: {name: detr, "
            "classification: softmax}}",
            "scores as targets",
        ),
    ],
)
def test_settings_that_contradict_boxes_are_named(tmp_path: Path, lines: str, text: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: digits/plain\n{lines}\ndistillation: {{method: teach_detr}}\n")
    with pytest.raises(UserError, match=text):
        load_config(recipe)


def test_a_method_with_a_network_refuses_boxes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "extends: digits/plain\nteacher: {detections: a.json}\ndistillation: {method: d3etr}\n"
    )
    with pytest.raises(UserError, match=r"method 'd3etr' needs a teacher\.weights"):
        load_config(recipe)
