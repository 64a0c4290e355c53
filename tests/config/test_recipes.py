"""Every recipe and every sweep that is shipped can be read."""

from pathlib import Path

import pytest

from d3etr.config.load import load_config
from d3etr.config.sweep import load_sweep
from d3etr.config.tree import Config
from d3etr.launch.sweeps.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "trainers" / "recipes"
DATA = (
    "data.train={images: a, annotations: a.json}",
    "data.validation={images: b, annotations: b.json}",
)
TEACHER = ("teacher.weights=teacher.safetensors",)
NEEDED = {
    "own": DATA,
    "own/d3etr.yaml": TEACHER,
    "own/rfdetr-d3etr.yaml": TEACHER,
    "own/rtdetr-d3etr.yaml": TEACHER,
    "own/dfine-d3etr.yaml": TEACHER,
    "own/unlabelled.yaml": TEACHER,
    "own/inherited.yaml": ("student.initialise_from.weights=teacher.safetensors",),
}
"""What a person has to add on the command line, by folder or recipe."""
FOLDERS = sorted(p.parent.relative_to(RECIPES).as_posix() for p in RECIPES.rglob("plain.yaml"))


def names() -> list[str]:
    found = (path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml"))
    return sorted(name for name in found if not name.endswith("base.yaml"))


@pytest.mark.parametrize("name", names())
def test_recipes_are_valid(name: str) -> None:
    added = [*NEEDED.get(name.split("/")[0], ()), *NEEDED.get(name, ())]
    config = load_config(RECIPES / name, added)
    assert config.run.name != "run", "a recipe names its runs"


def read(name: str) -> Config:
    folder = name.split("/")[0]
    return load_config(RECIPES / name, (*NEEDED.get(folder, ()), *NEEDED.get(name, ())))


def test_students_of_one_comparison_differ_in_nothing_but_the_teaching() -> None:
    for folder in FOLDERS:
        plain, taught = read(f"{folder}/plain.yaml"), read(f"{folder}/d3etr.yaml")
        assert plain.data == taught.data
        assert plain.student.detector == taught.student.detector
        assert plain.student.backbone_weights == taught.student.backbone_weights
        assert plain.evaluation == taught.evaluation
        assert plain.run.seed == taught.run.seed
        if folder != "digits":
            assert plain.optimisation == taught.optimisation


def test_a_student_that_inherits_has_a_plain_rival_that_inherits_the_same() -> None:
    for folder in FOLDERS:
        taught = read(f"{folder}/d3etr.yaml")
        if taught.student.initialise_from is None:
            continue
        rival = read(f"{folder}/inherited.yaml")
        assert rival.initial_weights == taught.initial_weights
        assert rival.student.initialise_from is not None
        assert rival.student.initialise_from.parts == taught.student.initialise_from.parts
        # Both within the same time, each at its own rate.
        ours = rival.optimisation.model_copy(
            update={
                "steps": taught.optimisation.steps,
                "learning_rate": taught.optimisation.learning_rate,
            }
        )
        assert ours == taught.optimisation


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "sweeps").glob("*.yaml")))
def test_sweeps_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(ROOT / "sweeps" / name)
    assert sweep.name.replace("-", "_") == name.removesuffix(".yaml")
    assert sweep.title and (make_plan(sweep).trials or sweep.search.trials > 1)
