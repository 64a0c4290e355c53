"""Studies: which runs they name, and how their results become a table."""

from pathlib import Path

import pytest

from d3etr.errors import UserError
from d3etr.launch.study import cells_of, collect, read_study, table

STUDY = """
title: A test
seeds: [0, 1]
set: [optimisation.steps=5]
baseline: plain
rows:
  plain: {recipe: RECIPE}
  slower: {recipe: RECIPE, set: [optimisation.learning_rate=1.0e-5]}
"""
RECIPE = "{data: {digit_scenes: {}}, optimisation: {epochs: null, steps: 3}}"


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.replace("RECIPE", str(recipe)))
    return path


def test_every_row_and_seed_is_a_run_of_its_own(study_file: Path) -> None:
    cells = cells_of(read_study(study_file))
    assert [(cell.row, cell.seed) for cell in cells] == [
        ("plain", 0),
        ("slower", 0),
        ("plain", 1),
        ("slower", 1),
    ]
    assert len({cell.folder() for cell in cells}) == 4


def test_commands_repeat_a_run(study_file: Path) -> None:
    command = " ".join(cells_of(read_study(study_file))[3].command())
    assert "--set optimisation.steps=5 --set optimisation.learning_rate=1.0e-5" in command
    assert "--set run.seed=1" in command


def test_overrides_of_the_command_line_reach_every_run_below_its_row(study_file: Path) -> None:
    cells = cells_of(read_study(study_file, ["optimisation.learning_rate=3.0e-5"]))
    assert [cell.overrides for cell in cells[:2]] == [
        ("optimisation.steps=5", "optimisation.learning_rate=3.0e-5", "run.seed=0"),
        (
            "optimisation.steps=5",
            "optimisation.learning_rate=3.0e-5",
            "optimisation.learning_rate=1.0e-5",
            "run.seed=0",
        ),
    ]


def test_table_shows_mean_spread_gain_and_failures(study_file: Path) -> None:
    study = read_study(study_file)
    cells = cells_of(study)
    summary = {"steps": 5, "training_seconds": 1.0}
    results = [
        (cells[0], {**summary, "test/mAP": 0.20}),
        (cells[1], {**summary, "test/mAP": 0.30}),
        (cells[2], {**summary, "test/mAP": 0.22}),
        (cells[3], "out of memory"),
    ]
    rows = collect(study, results)
    text = table(study, rows)
    assert "| plain | 5 | 20.0 / 22.0 | 21.0 | 1.4 |  |" in text
    assert "| slower | 5 | 30.0 / failed | 30.0 | 0.0 | +9.0 |" in text


def test_an_unknown_baseline_is_refused(study_file: Path) -> None:
    study_file.write_text(study_file.read_text().replace("baseline: plain", "baseline: none"))
    with pytest.raises(UserError, match="baseline 'none' is none of plain, slower"):
        read_study(study_file)
