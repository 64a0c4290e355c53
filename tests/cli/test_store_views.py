"""``d3etr store-views``: the store that training then finds."""

import json
from pathlib import Path

import pytest
from tiny import changed, save_untrained, tiny_detector_config
from tiny_recipe import tiny_recipe

from d3etr.cli.main import main
from d3etr.config.load import load_config


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    scenes = {"root": str(tmp_path / "scenes"), "train_images": 24, "validation_images": 4}
    scenes |= {"test_images": 4, "image_size": 32, "minimum_scale": 8, "maximum_scale": 16}
    weights = tmp_path / "teacher.safetensors"
    file.write_text(
        tiny_recipe(
            run={"output": str(tmp_path / "runs")},
            data={"digit_scenes": scenes, "augmentation": {"horizontal_flip": 0.5}},
            teacher={"weights": str(weights), "views": {"count": 2}},
            distillation={"method": "d3etr"},
            optimisation={"epochs": 1},
        )
    )
    data = load_config(file).data
    save_untrained(weights, changed(tiny_detector_config(), queries=7), data)
    return file


def test_training_finds_what_the_command_stored(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store-views", str(recipe), "--quiet", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)["stores"]
    shards = sorted(Path(found["folder"]).glob("*.safetensors"))
    assert (found["views"], found["images"], len(shards)) == (2, 24, 2)
    assert found["bytes"] == sum(shard.stat().st_size for shard in shards)
    assert [path.name for path in (tmp_path / "runs" / "teacher-views").iterdir()] == [
        Path(found["folder"]).name
    ]
    times = [shard.stat().st_mtime_ns for shard in shards]
    assert main(["train", str(recipe), "--launcher", "local", "--quiet"]) == 0
    assert [shard.stat().st_mtime_ns for shard in shards] == times


def test_images_without_labels_have_a_store_of_their_own(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["store-views", str(recipe), "--quiet", "--set", "teacher.views.unlabelled_count=1"]
    command += ["--set", "data.labelled_share=0.25"]
    command += ["--set", "data.unlabelled={rest_of_train: true}"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["stores"]
    assert [(store["views"], store["images"]) for store in found] == [(2, 6), (1, 18)]
    folders = [Path(store["folder"]) for store in found]
    assert [len([*folder.glob("*.safetensors")]) for folder in folders] == [2, 1]
    assert main(command) == 0
    assert f"views: 1 of 18 images, 0.1 MB, in {folders[1]}" in capsys.readouterr().out


def test_a_recipe_without_views_is_one_sentence(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store-views", str(recipe), "--quiet", "--set", "teacher.views=null"]) == 2
    assert "expected teacher.views" in capsys.readouterr().err


@pytest.mark.slow
def test_ray_workers_share_the_store(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for name, launcher in {"one": "local", "two": "ray"}.items():
        command = ["store-views", str(recipe), "--quiet", "--json", "--launcher", launcher]
        command += ["--set", f"run.output={tmp_path / name}", "--set", "teacher.views.count=4"]
        assert main([*command, "--set", f"cluster.workers={1 + (name == 'two')}"]) == 0
        [store] = json.loads(capsys.readouterr().out)["stores"]
        folders.append(Path(store["folder"]))
    ours, theirs = ([p.read_bytes() for p in sorted(f.glob("*.safetensors"))] for f in folders)
    assert len(ours) == 4
    assert ours == theirs
