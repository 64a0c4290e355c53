from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_recipe import tiny_recipe

from d3etr.config.load import load_config
from d3etr.config.tree import Config
from d3etr.engine.find_run import (
    absolute_paths,
    find_run,
    folder_of,
    prepare,
    resumed_config,
)
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.files import atomic_write

MakeConfig = Callable[..., Config]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """The tiny recipe with its runs in this test's folder, and overrides on top."""
    file = tmp_path / "tiny.yaml"
    file.write_text(tiny_recipe())

    def make(*overrides: str) -> Config:
        places = (f"run.output={tmp_path / 'runs'}", f"data.digit_scenes.root={tmp_path}")
        return load_config(file, [*places, *overrides])

    return make


def make_run(config: Config) -> RunFolder:
    folder = folder_of(config)
    prepare(folder, config)
    return folder


def test_a_changed_recipe_has_another_folder(make_config: MakeConfig) -> None:
    first, second = make_config(), make_config("optimisation.epochs=4")
    assert folder_of(first).path != folder_of(second).path
    assert folder_of(first).path.name.startswith("tiny-")


def test_what_cannot_change_results_keeps_the_folder(make_config: MakeConfig) -> None:
    other = make_config("cluster.workers=2", "tracking.experiment=x", "data.workers=2")
    assert folder_of(make_config()).path == folder_of(other).path


def test_the_kept_configuration_has_absolute_paths_and_loads(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config("run.output=somewhere", "student.backbone_weights=weights/b.safetensors")
    kept = load_config(make_run(config).config)
    assert kept.run.output == tmp_path / "somewhere"
    assert kept.student.backbone_weights == tmp_path / "weights" / "b.safetensors"


def test_weights_that_have_a_name_stay_a_name(make_config: MakeConfig) -> None:
    config = make_config("student.backbone_weights=imagenet")
    assert absolute_paths(config).student.backbone_weights == "imagenet"


def test_a_run_is_found_by_the_beginning_of_its_name(make_config: MakeConfig) -> None:
    folder = make_run(make_config())
    make_run(make_config("run.name=other"))
    assert find_run("tiny", folder.path.parent) == folder
    assert find_run(str(folder.path), Path("elsewhere")) == folder


def test_a_full_name_wins_over_longer_ones(make_config: MakeConfig) -> None:
    folder = make_run(make_config())
    make_run(make_config(f"run.name={folder.path.name}"))
    assert find_run(folder.path.name, folder.path.parent) == folder


def test_an_ambiguous_name_lists_the_runs_that_fit(make_config: MakeConfig) -> None:
    runs = [make_run(make_config()), make_run(make_config("run.seed=1"))]
    with pytest.raises(UserError, match="fits 2 runs") as caught:
        find_run("tiny", runs[0].path.parent)
    assert all(run.path.name in str(caught.value) for run in runs)


def test_an_absent_name_lists_what_is_there(make_config: MakeConfig) -> None:
    folder = make_run(make_config())
    with pytest.raises(UserError, match="no run 'tinny'") as caught:
        find_run("tinny", folder.path.parent)
    assert folder.path.name in str(caught.value)


def test_a_folder_without_runs_is_said_to_be_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are no runs in .*run\.output"):
        find_run("tiny", tmp_path)


def test_resuming_accepts_other_machines_but_no_other_recipe(make_config: MakeConfig) -> None:
    folder = make_run(make_config())
    assert resumed_config(folder, ["cluster.workers=2"]).cluster.workers == 2
    with pytest.raises(UserError) as caught:
        resumed_config(folder, ["optimisation.learning_rate=0.5", "cluster.workers=2"])
    text = str(caught.value)
    assert "optimisation.learning_rate: 0.001 there, 0.5 now" in text
    assert "cluster" not in text


def test_a_run_is_finished_when_it_has_a_summary_and_weights(make_config: MakeConfig) -> None:
    folder = make_run(make_config())
    folder.summary.write_text('{"mAP": 0.5, "method": "none", "ok": true}')
    assert folder.result() is None
    folder.weights.touch()
    assert folder.result() == {"mAP": 0.5}


def renamed(folder: RunFolder, name: str) -> RunFolder:
    """The run's folder under the name that another version would have given it."""
    return RunFolder(folder.path.rename(folder.path.with_name(name)))


@pytest.mark.parametrize("name", ["tiny-01234567", "tiny-0123456789abcdef", "tiny-01234567-2"])
def test_another_digest_of_the_same_configuration_names_its_folder(
    make_config: MakeConfig, name: str
) -> None:
    older = renamed(make_run(make_config()), name)
    assert folder_of(make_config()) == older
    assert folder_of(make_config("cluster.workers=2")) == older, "results are the same"
    assert folder_of(make_config("run.seed=1")) != older
    own = make_run(make_config("run.seed=1"))
    assert folder_of(make_config()) == older != own


def test_a_folder_without_the_configuration_is_not_taken_for_the_runs(
    make_config: MakeConfig,
) -> None:
    older = renamed(make_run(make_config()), "tiny-01234567")
    kept = older.config.read_text()
    for changed in (
        kept.replace("seed: 0", "seed: 7"),  # other results
        kept.replace("name: tiny", "name: tiny-other"),  # a run whose name begins alike
        "run: [",
    ):
        assert changed != kept
        older.config.write_text(changed)
        assert folder_of(make_config()) != older
    other = renamed(older, "tiny-other")
    other.config.write_text(kept)
    assert folder_of(make_config()) != other, "not a digest"


def test_what_is_written_is_whole_or_not_there(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("before")
    for target in (file, folder):
        with pytest.raises(ZeroDivisionError), atomic_write(target) as temporary:
            (temporary.write_text("half") if target is file else temporary.mkdir())
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "before"
    with atomic_write(file) as temporary:
        temporary.write_text("after")
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        (temporary / "part").touch()
    assert file.read_text() == "after" and (folder / "part").exists()
    assert len(list(tmp_path.iterdir())) == 2
