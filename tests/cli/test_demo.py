"""The demonstration, made small: four runs, a table, commands that can be pasted."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from d3etr.cli.main import main
from d3etr.config.load import load_config
from d3etr.demo import runs as demo
from d3etr.detectors.build import build_detector
from d3etr.detectors.weights import WeightsInfo, read_info, save_weights
from d3etr.errors import UserError

RECIPES = Path("trainers", "recipes", "digits")
WEIGHTS = Path("trainers") / demo.TEACHER_WEIGHTS
TINY = (
    "data.digit_scenes.train_images=32",
    "data.digit_scenes.validation_images=8",
    "data.digit_scenes.test_images=8",
    "student.detector.width=32",
    "student.detector.heads=2",
    "student.detector.backbone.stem_width=8",
    "student.detector.backbone.stage_widths=[8, 8, 16]",
    "student.detector.backbone.stage_blocks=1",
    "optimisation.steps=6",
    "optimisation.schedule.warmup_steps=1",
    "evaluation.batch_size=8",
    "tracking.figures=false",
)


@pytest.fixture
def project(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with the recipes, and a teacher that knows nothing yet."""
    monkeypatch.chdir(tmp_path)
    recipes = tmp_path / RECIPES
    shutil.copytree(repository / RECIPES, recipes)
    base = recipes / "base.yaml"
    shipped = "  backbone_weights: ../../weights/digits-student-backbone.safetensors\n"
    assert shipped in base.read_text()
    # The shipped teacher's backbone is not shipped by itself: its recipe names a missing file.
    base.write_text(base.read_text().replace(shipped, ""))
    distilled = recipes / "d3etr.yaml"
    distilled.write_text(distilled.read_text().replace("minimum_mAP: 0.5", "minimum_mAP: 0.0"))
    config = load_config(recipes / "teacher.yaml", TINY)
    torch.manual_seed(0)
    info = WeightsInfo(
        detector=config.student.detector,
        categories=tuple((digit, str(digit)) for digit in range(10)),
        preprocessing=config.data.preprocessing,
        origin={"step": 6000},
    )
    teacher = build_detector(config.student.detector, 10)
    save_weights(tmp_path / WEIGHTS, teacher, info, torch.float16)
    return tmp_path


def arguments(*more: str) -> list[str]:
    sets = [part for value in TINY for part in ("--set", value)]
    return ["demo", "--launcher", "local", *sets, *more]


@pytest.mark.slow
def test_four_runs_are_made_once_and_put_side_by_side(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments("--json")) == 0
    first = json.loads(capsys.readouterr().out)
    titles = ["teacher", "plain student", "inherited student", "D3ETR student"]
    assert [run["title"] for run in first] == titles
    assert len({run["mlflow_run"] for run in first}) == 4, "four tracked runs"
    steps = [run["metrics"]["steps"] for run in first]
    assert steps == [6000, 6, 6, 6], "the shipped teacher's own, then what was asked for"
    assert all("test/mAP" in run["metrics"] for run in first)

    teacher, _, inherited, distilled = (Path(run["run_dir"]) for run in first)
    start = load_config(inherited / "config.yaml").initial_weights
    assert start == teacher / "weights.safetensors"
    teacher_config = load_config(distilled / "config.yaml").teacher
    assert teacher_config is not None
    assert teacher_config.weights == teacher / "weights.safetensors"
    assert read_info(teacher_config.weights).origin["step"] == 6000

    assert main(arguments()) == 0
    shown = capsys.readouterr()
    assert "training 6 steps" not in shown.err, "finished runs are not repeated"
    assert "D3ETR student" in shown.out
    commands = [line.strip() for line in shown.out.splitlines() if " -m d3etr predict " in line]
    words = shlex.split(commands[0])
    assert main(words[words.index("d3etr") + 1 :]) == 0, "the printed command works"
    assert list((project / "predictions").glob("*.png"))
    assert "viewStateShareKey=d3etr-" in shown.out, "MLflow's page with these runs"
    commands = [line.strip() for line in shown.out.splitlines() if " -m d3etr compare " in line]
    words = shlex.split(commands[0])
    assert main(words[words.index("d3etr") + 1 :]) == 0
    page = (project / "comparison.html").read_text(encoding="utf-8")
    assert "The same test images" in page and "D3ETR student" in page


def test_without_shipped_weights_it_says_how_to_train_them(project: Path) -> None:
    (project / WEIGHTS).unlink()
    with pytest.raises(UserError, match="make demo TEACHER=train"):
        demo.run_demo(launcher="local", overrides=TINY)
    assert not (project / "runs").exists()


def test_all_recipes_are_checked_before_anything_runs(project: Path) -> None:
    (project / RECIPES / "d3etr.yaml").write_text("extends: base.yaml\nrunn: {}\n")
    with pytest.raises(UserError, match="did you mean 'run'"):
        demo.run_demo(launcher="local", overrides=TINY)
    assert not (project / "runs").exists()


@pytest.mark.slow
def test_shipped_weights_of_another_recipe_are_refused(project: Path) -> None:
    other = [*TINY, "student.detector.queries=9", "tracking.enabled=false"]
    with pytest.raises(UserError, match="holds another detector than the recipe"):
        demo.run_demo(launcher="local", overrides=other)


@pytest.mark.slow
def test_missing_backbones_are_pretrained(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = project / RECIPES / "plain.yaml"
    place = project / "weights" / "backbone.safetensors"
    sets = [part for value in TINY for part in ("--set", value)]
    sets += ["--set", f"student.backbone_weights={place}"]
    sets += ["--set", "student.pretraining.steps=2", "--set", "student.pretraining.batch_size=4"]
    assert main(["pretrain-backbone", str(recipe), *sets, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == str(place)
    assert place.exists()


def test_pretraining_without_a_place_to_write_says_so(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(project / RECIPES / "plain.yaml")
    assert main(["pretrain-backbone", recipe, "--set", "student.backbone_weights=null"]) == 2
    assert "--set student.backbone_weights=FILE" in capsys.readouterr().err
