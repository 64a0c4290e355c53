"""Runs that a foundation model teaches, and recipes that say so wrongly."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foundation_folders import write_folder
from tiny_runs import MakeConfig, assert_same_run, values

from d3etr.config.detector import TeacherConfig
from d3etr.config.distillation import MethodConfig
from d3etr.config.load import load_config, to_yaml
from d3etr.config.tree import Config
from d3etr.dry_run import describe
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.find_run import absolute_paths
from d3etr.engine.journal import read_journal
from d3etr.engine.preflight import judge_beginning
from d3etr.engine.run import run_training
from d3etr.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model") / "dino")


def _taught(config: Config, folder: Path, method: dict[str, Any], **teacher: Any) -> Config:
    """The run with a foundation model instead of its teacher."""
    pictures = config.data.preprocessing.model_copy(update={"normalisation": "imagenet"})
    changes = {
        "data": config.data.model_copy(update={"preprocessing": pictures}),
        "teacher": TeacherConfig(features=folder, **teacher),
        "distillation": MethodConfig.parse({"method": "feature_cosine"} | method),
    }
    fields = {name: getattr(config, name) for name in type(config).model_fields}
    return Config(**(fields | changes))


def train(config: Config, run_dir: Path) -> dict[str, float]:
    return run_training(config, run_dir, SingleProcess(torch.device("cpu")))


def _messages(run_dir: Path, level: str) -> list[str]:
    entries = read_journal(run_dir / "journal.jsonl")
    return [e["text"] for e in entries if e["kind"] == "message" and e["level"] == level]


def test_a_run_learns_features_without_a_detector_that_teaches(
    make_config: MakeConfig, folder: Path, tmp_path: Path
) -> None:
    summary = train(_taught(make_config(optimisation={"epochs": 4}), folder, {}), tmp_path)
    losses = values(tmp_path, "train/features")
    assert 0 < losses[-1] < losses[0]
    assert "teacher/mAP" not in summary
    said = _messages(tmp_path, "info")
    assert f"teacher.features {folder}: licence apache-2.0 (README.md)" in said


def test_the_encoders_share_steers_the_weight_and_runs_repeat(
    make_config: MakeConfig, folder: Path, tmp_path: Path
) -> None:
    config = _taught(make_config(), folder, {"gradient_share": {"target": 0.9}})
    for name in ("run", "again"):
        train(config, tmp_path / name)
    steered = [text for text in _messages(tmp_path / "run", "info") if "gradient_share" in text]
    assert len(steered) == 6 and "the weight is now x" in steered[0]
    assert float(steered[0].rpartition(" x ")[2]) > 1
    assert_same_run(tmp_path / "again", tmp_path / "run")


def test_a_larger_picture_and_another_precision_have_an_effect(
    make_config: MakeConfig, folder: Path, tmp_path: Path
) -> None:
    found = []
    for name, teacher in (
        ("plain", {}),
        ("larger", {"image_scale": 2.0}),
        ("bfloat16", {"precision": "bfloat16"}),
    ):
        config = make_config(optimisation={"epochs": 1})
        train(_taught(config, folder, {}, **teacher), tmp_path / name)
        found.append(values(tmp_path / name, "train/features"))
    assert found[0] != found[1] and found[0] != found[2]
    assert found[0] == pytest.approx(found[2], rel=0.1)


def test_what_a_folder_lacks_is_found_before_anything_starts_and_said(
    make_config: MakeConfig, folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    config = _taught(make_config(), copy, {})
    assert "features of a dinov2, licence apache-2.0 (README.md)" in describe(config)
    (copy / "README.md").unlink()
    assert "licence not found" in describe(config)
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json missing"):
        judge_beginning(config)


def test_a_run_without_a_licence_warns_and_goes_on_with_the_same_model_only(
    make_config: MakeConfig, folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    (copy / "README.md").unlink()
    config = _taught(make_config(optimisation={"epochs": 1}), copy, {})
    train(config, tmp_path / "run")
    warned = _messages(tmp_path / "run", "warning")
    assert any("no licence found" in text for text in warned)
    (tmp_path / "run" / "summary.json").unlink()
    file = copy / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    changed = r"teacher\.features/preprocessor_config\.json is not what the run .* began"
    with pytest.raises(UserError, match=changed):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("teacher: {features: a, weights: b}", "exactly one of weights, detections and features"),
        ("teacher: {features: 'https://hub/a'}", "'https://hub/a', expected a folder on this"),
        ("teacher: {features: a, minimum_mAP: 0.1}", "minimum_mAP have no effect on a foundation"),
        ("teacher: {features: a, views: {}}", "views have no effect on a foundation model"),
        (
            "teacher: {features: a}\ndistillation: {method: d3etr}",
            r"method 'd3etr' needs a teacher\.weights",
        ),
        (
            "teacher: {detections: a.json}",
            r"'feature_cosine' needs a teacher\.weights or teacher\.features",
        ),
        (
            "teacher: {features: a}\ndata: {preprocessing: {normalisation: per_image}}",
            r"normalisation 'per_image' cannot be undone: set it to 'imagenet'",
        ),
        ("teacher: {features: a}\nstudent: {initialise_from: {}}", "there is no teacher whose"),
    ],
)
def test_settings_that_contradict_features_are_named(tmp_path: Path, lines: str, text: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    method = "" if "distillation" in lines else "distillation: {method: feature_cosine}\n"
    pictures = "data: {preprocessing: {normalisation: imagenet}}\n" if "data:" not in lines else ""
    recipe.write_text(f"extends: digits/plain\n{pictures}{method}{lines}\n")
    with pytest.raises(UserError, match=text):
        load_config(recipe)


def test_the_folder_is_kept_as_an_absolute_path(tmp_path: Path) -> None:
    recipe, kept = tmp_path / "recipe.yaml", tmp_path / "kept.yaml"
    recipe.write_text(
        "extends: digits/plain\ndata: {preprocessing: {normalisation: imagenet}}\n"
        "teacher: {features: models/dino}\ndistillation: {method: feature_cosine}\n"
    )
    config = absolute_paths(load_config(recipe), tmp_path)
    assert config.teacher is not None
    assert config.teacher.features == tmp_path / "models" / "dino"
    kept.write_text(to_yaml(config))
    assert load_config(kept) == config
