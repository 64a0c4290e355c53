"""A distilled run under Ray whose data and teacher are on storages."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from file_server import FileServer
from s3_store import s3_store
from tiny import save_untrained, tiny_detector_config
from tiny_recipe import tiny_recipe

from d3etr.config.data import DataConfig, DigitScenesConfig, PreprocessingConfig
from d3etr.config.load import load_config
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.engine.journal import read_journal
from d3etr.launch.api import launch
from d3etr.launch.ray_environment import package_environment

pytestmark = pytest.mark.slow

RECIPE = tiny_recipe(
    run={"name": "remote"},
    data={"digit_scenes": None},
    distillation={"method": "d3etr"},
    optimisation={"epochs": 2},
    cluster={"maximum_failures": 0, "workers": 2},
)
TRAINING, VALIDATION = 16, 6


@pytest.fixture
def shared(served: Path) -> Path:
    """The served folder with scenes and a teacher in it."""
    scenes = DigitScenesConfig(
        root=served / "made",
        train_images=TRAINING,
        validation_images=VALIDATION,
        test_images=2,
        image_size=32,
        maximum_objects=3,
        maximum_scale=16,
    )
    train = write_digit_scenes(scenes)["train"]
    assert isinstance(train.images, Path)
    (served / "scenes").symlink_to(train.images.parent.parent)
    plain = PreprocessingConfig(normalisation="per_image", shortest_side=None, longest_side=None)
    data = DataConfig(digit_scenes=scenes, preprocessing=plain)
    save_untrained(served / "teacher.safetensors", tiny_detector_config(queries=8), data)
    return served


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """An S3 store with an empty bucket of that name."""
    with s3_store(monkeypatch, "bucket") as files:
        yield files


def overrides(data: str, teacher: str, output: Path) -> list[str]:
    """The places that a run reads and writes."""
    splits = [
        f"data.{name}={{images: '{data}/scenes/images/{name}', "
        f"annotations: '{data}/scenes/annotations/{name}.json'}}"
        for name in ("train", "validation")
    ]
    return [*splits, f"teacher.weights={teacher}", f"run.output={output}"]


def losses(run_dir: Path) -> list[float]:
    records = read_journal(run_dir / "journal.jsonl")
    return [r["metrics"]["train/loss"] for r in records if r["kind"] == "step"]


def test_two_workers_of_ray_train_from_urls_as_one_process_does_from_a_folder(
    shared: Path,
    server: FileServer,
    bucket: fsspec.AbstractFileSystem,
    tmp_path: Path,
    cache: Path,
    repository: Path,
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    teacher = shared / "teacher.safetensors"
    local = load_config(recipe, overrides(str(shared), str(teacher), tmp_path / "local"))
    expected = launch(local, launcher="local", quiet=True)
    assert not cache.exists()

    bucket.put_file(str(teacher), "bucket/teacher.safetensors")
    places = overrides(server.url, "s3://bucket/teacher.safetensors", tmp_path / "runs")
    line = [sys.executable, str(repository / "trainers" / "run.py"), str(recipe), "--json"]
    done = subprocess.run(
        [*line, *(part for place in places for part in ("--set", place))],
        env=os.environ | package_environment() | {"RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    run_dir = Path(result["run_dir"])
    assert losses(run_dir) == pytest.approx(losses(expected.run_dir), rel=1e-4)
    for name in ("mAP", "teacher/mAP"):
        assert result["metrics"][name] == pytest.approx(expected.metrics[name], abs=1e-4)
    ours, theirs = (
        json.loads((folder / "summary.json").read_text())["inputs"]
        for folder in (run_dir, expected.run_dir)
    )
    assert ours == theirs and "teacher.weights" in ours

    fetched = {path: count for (method, path), count in server.asked.items() if method == "GET"}
    assert set(fetched.values()) == {1}
    assert len(fetched) == TRAINING + VALIDATION + 2
    assert sum(file.is_file() for file in cache.rglob("*")) >= len(fetched) + 1
