"""A finished run is handed out for the configuration and the files that it was trained with."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_recipe import tiny_recipe

from d3etr.config.data import DigitScenesConfig
from d3etr.config.load import load_config
from d3etr.config.sweep import load_sweep
from d3etr.config.tree import Config
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.engine.find_run import folder_of, prepare
from d3etr.engine.journal import read_journal
from d3etr.errors import UserError
from d3etr.launch.api import launch
from d3etr.launch.driver import RunResult
from d3etr.launch.sweeps.plan import Plan, make_plan
from d3etr.launch.sweeps.results import ended_before

STEPS = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, a recipe that names it and the run that it gave."""
    root = tmp_path_factory.mktemp("project")
    scenes = DigitScenesConfig(
        root=root / "scenes",
        train_images=24,
        validation_images=8,
        test_images=4,
        image_size=32,
        minimum_scale=8,
        maximum_scale=16,
    )
    written = write_digit_scenes(scenes)["train"].annotations
    assert isinstance(written, Path)
    written.parent.parent.rename(root / "data")
    splits = {
        name: {
            "images": str(root / "data" / "images" / name),
            "annotations": str(root / "data" / "annotations" / f"{name}.json"),
        }
        for name in ("train", "validation", "test")
    }
    recipe = tiny_recipe(
        data={"digit_scenes": None, **splits},
        optimisation={"epochs": 1},
        evaluation={"test": True},
        run={"output": str(root / "runs")},
    )
    (root / "tiny.yaml").write_text(recipe)
    assert start(root).trained
    return root


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """The same at the same place, as a test changes it and leaves it."""
    shutil.copytree(trained, tmp_path / "kept", symlinks=True)
    yield trained
    shutil.rmtree(trained)
    shutil.copytree(tmp_path / "kept", trained)


def config_of(project: Path) -> Config:
    return load_config(project / "tiny.yaml")


def start(project: Path) -> RunResult:
    return launch(config_of(project), launcher="local", quiet=True)


def steps(run_dir: Path) -> list[int]:
    return [r["step"] for r in read_journal(run_dir / "journal.jsonl") if r["kind"] == "step"]


def plan_of(project: Path) -> Plan:
    """A sweep with one trial, of this recipe."""
    case = f"name: tried\nrecipe: {project / 'tiny.yaml'}\ncases: {{one: {{}}}}\n"
    (project / "sweep.yaml").write_text(case)
    return make_plan(load_sweep(project / "sweep.yaml"))


def sweep_twin(project: Path) -> Path | None:
    """The finished run that a sweep's trial of this recipe would take over."""
    plan = plan_of(project)
    return plan.finished_twin(plan.config(plan.trials[0]))


def test_a_trial_of_another_sweep_is_found_by_relative_paths_too(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    plans = []
    for name in ("first", "second"):
        sections = {
            split: f"{{images: data/images/{split}, annotations: data/annotations/{split}.json}}"
            for split in ("train", "validation", "test")
        }
        given = [f"data.{split}={section}" for split, section in sections.items()]
        tree = {
            "name": name,
            "recipe": str(project / "tiny.yaml"),
            "cases": {"one": {"set": given}},
        }
        Path(f"{name}.yaml").write_text(json.dumps(tree))
        plans.append(make_plan(load_sweep(Path(f"{name}.yaml"))))
    first, second = plans
    config = first.placed(first.config(first.trials[0]))
    own, trained = folder_of(config), folder_of(config_of(project))
    prepare(own, config)
    for file in (trained.summary, trained.weights):
        file.rename(own.path / file.name)
    assert second.finished_twin(second.config(second.trials[0])) == own.path


def test_a_sweep_whose_data_have_changed_is_refused(project: Path) -> None:
    plan = plan_of(project)
    config = plan.config(plan.trials[0])
    own, trained = folder_of(config), folder_of(config_of(project))
    prepare(own, plan.placed(config))
    for file in (trained.summary, trained.weights):
        file.rename(own.path / file.name)
    assert ended_before(plan, plan.trials)[0].run_dir == own.path
    edit_boxes(project / "data" / "annotations" / "train.json")
    with pytest.raises(UserError, match="the training data is not what the run"):
        ended_before(plan, plan.trials)


def edit_boxes(file: Path) -> None:
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] += 1
    file.write_text(json.dumps(content))


def repaint(image: Path) -> None:
    """Another picture in as many bytes, at the same time of change."""
    before = image.stat()
    image.write_bytes(bytes(reversed(image.read_bytes())))
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "training boxes": (
        "the training data is not what the run",
        lambda data: edit_boxes(data / "annotations" / "train.json"),
    ),
    "validation boxes": (
        "the validation data is",
        lambda data: edit_boxes(data / "annotations" / "validation.json"),
    ),
    "test boxes": ("the test data", lambda data: edit_boxes(data / "annotations" / "test.json")),
    "no annotations any more": (
        "the training data",
        lambda data: (data / "annotations" / "train.json").write_text("{") and None,
    ),
    "a picture of the same size and time": (
        "the training images are not what",
        lambda data: repaint(data / "images" / "train" / "000003.png"),
    ),
    "a picture less": (
        "the test data",
        lambda data: (data / "images" / "test" / "000001.png").unlink(),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_result_is_not_handed_out_for_changed_data(project: Path, change: str) -> None:
    message, apply = CHANGES[change]
    assert sweep_twin(project) == folder_of(config_of(project)).path
    apply(project / "data")
    with pytest.raises(UserError, match=message) as caught:
        start(project)
    assert "Put the old files back, or give the run another name (run.name" in str(caught.value)
    assert sweep_twin(project) is None
    if "test" not in message and change != "no annotations any more":
        (folder_of(config_of(project)).summary).unlink()
        with pytest.raises(UserError, match=message):
            start(project)  # nor is a run resumed with other data


def test_data_that_were_copied_touched_or_removed_are_no_other_data(project: Path) -> None:
    for file in (project / "data").glob("**/*.*"):
        file.touch()
    (project / "data" / "images" / "train" / "notes.txt").write_text("not a picture")
    assert not start(project).trained
    assert sweep_twin(project) is not None
    shutil.copytree(project / "data", project / "copy")
    shutil.rmtree(project / "data")
    assert not start(project).trained, "results outlive the data"
    (project / "copy").rename(project / "data")
    assert not start(project).trained


def test_a_changed_default_does_not_give_the_result_of_the_old_one(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = folder_of(config_of(project))
    text = first.config.read_text()
    assert "weight_decay: 0.0001\n" in text
    # An earlier version had another default: the run's recipe is silent about it.
    first.config.write_text(text.replace("weight_decay: 0.0001\n", "weight_decay: 0.002\n"))
    before = first.summary.read_bytes()
    assert sweep_twin(project) is None
    result = start(project)
    assert result.trained and result.run_dir.name == f"{first.path.name}-2"
    assert first.summary.read_bytes() == before
    again = start(project)
    assert not again.trained and again.run_dir == result.run_dir
    assert sweep_twin(project) == result.run_dir


def test_a_key_that_a_later_version_adds_orphans_no_run(project: Path) -> None:
    folder = folder_of(config_of(project))
    text = folder.config.read_text()
    folder.config.write_text(text.replace("  weight_decay: 0.0001\n", ""))
    assert folder.config.read_text() != text
    assert not start(project).trained
    assert sweep_twin(project) == folder.path


def test_a_run_is_found_though_its_name_has_the_digest_of_an_earlier_version(
    project: Path,
) -> None:
    folder = folder_of(config_of(project)).path
    earlier = folder.with_name("tiny-01234567")
    folder.rename(earlier)
    result = start(project)
    assert (result.run_dir, result.trained) == (earlier, False)


def test_a_damaged_configuration_is_named_and_written_anew(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(config_of(project))
    whole = folder.config.read_text()
    folder.config.write_text("run: [")
    assert not start(project).trained
    assert "config.yaml" in caplog.text and "its name says" in caplog.text
    assert folder.config.read_text() == whole


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\xff", '"text"', "1" * 5000])
def test_a_damaged_summary_is_named_and_the_checkpoint_used(
    project: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    folder = folder_of(config_of(project))
    before = folder.result()
    assert before is not None
    folder.summary.write_text(content, encoding="latin-1")
    assert sweep_twin(project) is None
    result = start(project)
    assert "summary.json is damaged" in caplog.text
    assert result.metrics["mAP"] == before["mAP"] and result.metrics["steps"] == STEPS
    assert steps(folder.path) == list(range(1, STEPS + 1)), "no step was trained again"


def test_weights_that_were_cut_off_are_named_and_restored(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(config_of(project))
    whole = folder.weights.read_bytes()
    folder.weights.unlink()
    folder.weights.write_bytes(whole[:-100])
    assert sweep_twin(project) is None
    start(project)
    assert "weights.safetensors is damaged" in caplog.text
    assert folder.weights.read_bytes() == whole
    folder.weights.unlink()
    start(project)
    assert folder.weights.read_bytes() == whole


def test_whole_numbers_of_a_result_stay_whole(project: Path) -> None:
    metrics = start(project).metrics
    for name in ("steps", "kept_step", "parameters", "seed"):
        assert type(metrics[name]) is int
