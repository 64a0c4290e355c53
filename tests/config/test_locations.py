"""Places in recipes: paths, URLs, and what looks like one and is none."""

from pathlib import Path

import pytest

from d3etr.config.load import config_digest, load_config, to_yaml
from d3etr.config.location import Url, parse_location
from d3etr.engine.find_run import folder_of, output_of
from d3etr.errors import UserError

DATA = (
    "data.train={images: s3://bucket/photos, annotations: s3://bucket/train.json}",
    "data.validation={images: photos, annotations: https://host/a b.json}",
    "optimisation.steps=1",
    "distillation.method=d3etr",
    "teacher.weights=gs://bucket/teacher.safetensors",
    "student.backbone_weights=file:///shared/backbone.safetensors",
)


def test_data_and_weights_may_be_urls(tmp_path: Path) -> None:
    config = load_config(None, DATA)
    assert config.data.train is not None and config.data.validation is not None
    assert config.data.train.images == Url("s3://bucket/photos")
    assert config.data.validation.images == Path("photos")
    assert str(config.data.validation.annotations) == "https://host/a b.json"
    assert config.student.backbone_weights == Url("file:///shared/backbone.safetensors")
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "recipe.yaml")
    assert again == config
    assert config_digest(again) == config_digest(config)


@pytest.mark.parametrize("text", ["a/b", "/a/b", "C:/a", "a b.json", "~nobody-here/x", "weights:1"])
def test_paths_stay_paths(text: str) -> None:
    assert parse_location(text) == Path(text)


def test_the_home_is_meant_wherever_a_path_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = ["run.output=~/runs", "data.digit_scenes.root=~/scenes", "optimisation.steps=1"]
    config = load_config(None, [*overrides, "student.backbone_weights=~/b.safetensors"])
    assert config.run.output == output_of(overrides) == tmp_path / "runs"
    assert output_of(["run.output='~/my runs'"]) == tmp_path / "my runs"
    assert output_of(["run.seed=1"]) == Path("runs")
    assert config.data.digit_scenes is not None
    assert config.data.digit_scenes.root == tmp_path / "scenes"
    assert config.student.backbone_weights == tmp_path / "b.safetensors"
    assert folder_of(config).path.parent == tmp_path / "runs"


def test_names_come_from_the_path_of_a_url() -> None:
    url = Url("https://user@host/folder/a%20b.json?key=1#x")
    assert url.name == "a b.json"
    assert url.shown == "https://host/folder/a%20b.json"
    assert url.path.parent.name == "folder"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("teacher.weights=s3:/bucket/a", "did you mean 's3://bucket/a'?"),
        ("teacher.weights=file://shared/a", "expected an absolute path after file://"),
        ("teacher.weights=s3:///", "expected a host or bucket"),
        ("teacher.weights=3", "found 3, expected a path or URL"),
        ("teacher.weights=s3://key:word@bucket/a", "a run's folder and MLflow would keep it"),
        ("teacher.weights='https://h/a?X-Amz-Signature=abc'", "given with 'X-Amz-Signature'"),
        ("run.output=s3://bucket/runs", "URLs are for data and weights that are read"),
        ("data.digit_scenes.root=s3:/bucket", "expected a path"),
    ],
)
def test_what_cannot_be_read_or_kept_is_refused(override: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [*DATA, override])
    assert text in str(caught.value)
    assert "word@" not in str(caught.value) and "abc" not in str(caught.value)
