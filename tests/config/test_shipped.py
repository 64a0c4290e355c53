"""Recipes, sweeps and weights by name, and where relative paths in them start."""

from pathlib import Path

import pytest

from d3etr.config.load import load_config
from d3etr.config.problems import ConfigError
from d3etr.config.shipped import recipe_names, shipped_folder, sweep_names
from d3etr.config.sweep import load_sweep

WEIGHTS = "trainers/weights/digits-teacher.safetensors"
RECIPE = """
data: {digit_scenes: {}}
optimisation: {steps: 5}
distillation: {method: d3etr}
teacher: {weights: teacher.safetensors}
student: {backbone_weights: weights/backbone.safetensors}
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def weights(recipe: str | Path) -> tuple[object, object]:
    config = load_config(recipe)
    assert config.teacher is not None
    return config.teacher.weights, config.student.backbone_weights


@pytest.mark.parametrize(
    "name", ["digits/d3etr", "digits/d3etr.yaml", "trainers/recipes/digits/d3etr.yaml"]
)
def test_a_shipped_recipe_is_found_from_anywhere_with_its_weights(
    name: str, elsewhere: Path
) -> None:
    found = load_config(name)
    assert found.run.name == "digits-d3etr"
    assert found.teacher is not None
    assert found.teacher.weights == shipped_folder() / WEIGHTS


def test_in_a_checkout_shipped_weights_keep_the_text_that_runs_of_before_have(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    teacher, _ = weights(Path("trainers/recipes/digits/d3etr.yaml"))
    assert teacher == Path(WEIGHTS)
    cases = load_sweep("sweeps/ablation.yaml").cases.values()
    start = f"student.initialise_from={{weights: {WEIGHTS}}}"
    assert sum(start in case.set for case in cases) > 5
    assert load_sweep("ablation").recipe.samefile("trainers/recipes/digits/d3etr.yaml")


def test_a_file_of_the_user_wins_over_a_shipped_name(elsewhere: Path) -> None:
    touch(elsewhere / "digits" / "plain.yaml").write_text("extends: digits/d3etr\nrun: {name: own}")
    assert load_config("digits/plain.yaml").run.name == "own"
    assert load_config("digits/plain").run.name == "digits-plain"


def test_weights_start_at_the_working_directory_and_then_at_the_recipe(
    elsewhere: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "project" / "mine.yaml"
    touch(recipe).write_text(RECIPE)
    here = (Path("teacher.safetensors"), Path("weights/backbone.safetensors"))
    assert weights(recipe) == here, "what is nowhere stays as it is"
    teacher = touch(recipe.parent / here[0])
    backbone = touch(recipe.parent / here[1])
    assert weights(recipe) == (teacher, backbone)
    assert weights(Path("../project/mine.yaml")) == (
        Path("../project/teacher.safetensors"),
        Path("../project/weights/backbone.safetensors"),
    )
    touch(elsewhere / here[0])
    assert weights(recipe) == (here[0], backbone)


def test_weights_start_at_the_recipe_that_names_them(elsewhere: Path, tmp_path: Path) -> None:
    base = tmp_path / "project" / "base.yaml"
    touch(base).write_text(RECIPE)
    teacher = touch(base.parent / "teacher.safetensors")
    touch(elsewhere / "mine.yaml").write_text("extends: ../project/base.yaml")
    assert weights("mine.yaml")[0] == Path("../project/teacher.safetensors")
    assert weights("mine.yaml")[0] != teacher, "relative where the recipe's own path is"


def test_a_link_to_a_folder_is_not_shortened(elsewhere: Path, tmp_path: Path) -> None:
    touch(tmp_path / "a" / "teacher.safetensors")
    (tmp_path / "a" / "b").mkdir()
    recipe = tmp_path / "a" / "b" / "mine.yaml"
    recipe.write_text(RECIPE.replace("teacher.saf", "../teacher.saf"))
    (elsewhere / "link").symlink_to(recipe.parent)
    assert weights("link/mine.yaml")[0] == Path("link/../teacher.safetensors")


def test_a_sweep_finds_what_lies_next_to_it(elsewhere: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pro, ject"
    teacher = touch(folder / "teacher.safetensors")
    touch(folder / "mine.yaml")
    (folder / "sweep.yaml").write_text(
        "name: s\nrecipe: mine.yaml\n"
        "cases:\n"
        "  a: {set: ['student.initialise_from={weights: teacher.safetensors, parts: [heads]}']}\n"
        "  b: {recipe: digits/plain, set: [optimisation.steps=3]}\n"
    )
    sweep = load_sweep(folder / "sweep.yaml")
    assert sweep.recipe == folder / "mine.yaml"
    start = f"student.initialise_from={{weights: '{teacher}', parts: [heads]}}"
    assert sweep.cases["a"].set == (start,)
    assert sweep.cases["b"].recipe == shipped_folder() / "trainers/recipes/digits/plain.yaml"
    assert sweep.cases["b"].set == ("optimisation.steps=3",)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits/d3ter", "did you mean 'digits/d3etr'"),
        ("digits/d3ter.yaml", "did you mean 'digits/d3etr'"),
        ("nothing/like/it", "expected one of: bccd/d3etr, "),
        ("", "Is a directory"),
    ],
)
def test_an_unknown_recipe_names_what_there_is(name: str, expected: str, elsewhere: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(name)


def test_an_unknown_sweep_names_what_there_is(elsewhere: Path) -> None:
    with pytest.raises(ConfigError, match=r"no sweep of this name.*did you mean 'ablation'"):
        load_sweep("abltion")


def test_every_shipped_name_leads_to_a_recipe_or_a_sweep(elsewhere: Path) -> None:
    assert {"digits/d3etr", "own/teacher", "coco/conditional-r50/d3etr"} < {*recipe_names()}
    assert not any(name.endswith("base") for name in recipe_names())
    for name in sweep_names():
        assert load_sweep(name).recipe.is_file()
