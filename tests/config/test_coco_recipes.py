"""The recipes of the papers' settings on COCO: complete, and what docs/coco.md says of them."""

import re
from pathlib import Path

import pytest
from coco_recipes import (
    RECIPES,
    ROOT,
    TRAIN_IMAGES,
    recipes,
    teacher_detector,
    write_coco,
    write_teacher_header,
)

from d3etr.config.detector import DetectorConfig
from d3etr.config.load import load_config
from d3etr.config.tree import Config
from d3etr.detectors.build import build_detector, count_parameters
from d3etr.dry_run import make_plan
from d3etr.registry import METHODS

STAND_IN = 128
SHORT = ("optimisation.schedule.warmup_steps=0",)
FIFTY = (*SHORT, "optimisation.epochs=50")


@pytest.fixture(scope="module")
def somewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which COCO and every teacher are where the recipes look for them."""
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder / "data" / "coco", STAND_IN, 8)
    for name in recipes():
        config = load_config(RECIPES / name)
        if config.teacher is not None:
            write_teacher_header(config, folder)
    return folder


@pytest.mark.parametrize("name", recipes())
def test_a_dry_run_needs_nothing_but_the_recipe(
    name: str, somewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(somewhere)
    config = load_config(RECIPES / name, SHORT)  # a warm-up is longer than so few steps
    plan = make_plan(config)
    assert plan.classes == 80
    epochs = config.optimisation.epochs
    assert epochs is not None
    assert plan.steps == epochs * (STAND_IN // config.optimisation.batch_size)
    assert make_plan(load_config(RECIPES / name, FIFTY)).steps == plan.steps // epochs * 50
    assert (plan.teacher_parameters is None) == (config.distillation.method == "none")
    if plan.teacher_parameters is not None:
        assert plan.teacher_parameters > plan.student_parameters


@pytest.mark.parametrize("name", [name for name in recipes() if "d3etr" in name])
def test_teachers_can_teach(name: str) -> None:
    config = load_config(RECIPES / name)
    teacher = teacher_detector(config)
    _check(config, teacher)
    assert config.teacher is not None and config.teacher.minimum_mAP >= 0.4


def _check(config: Config, teacher: DetectorConfig) -> None:
    method = METHODS.find(config.distillation.method)
    method.check_compatible(config.distillation, config.student.detector, teacher, 80)


@pytest.mark.parametrize(
    ("name", "method"),
    [("dab-r18", "kd_detr"), ("deformable-r50", "detrdistill"), ("deformable-r18", "detrdistill")],
)
def test_the_other_papers_methods_are_one_setting_away(name: str, method: str) -> None:
    config = load_config(RECIPES / name / "d3etr.yaml", [f"distillation.method={method}"])
    _check(config, teacher_detector(config))


@pytest.mark.parametrize(("backbone", "millions"), [("resnet50", 44), ("resnet101", 63)])
def test_detectors_are_as_large_as_the_official_ones(backbone: str, millions: int) -> None:
    setting = f"student.detector.backbone.name={backbone}"
    config = load_config(RECIPES / "conditional-r50" / "plain.yaml", [setting])
    detector = build_detector(config.student.detector, 80)
    # They have 11 classes more and round.
    assert abs(count_parameters(detector) / 1e6 - millions) < 1


def test_detectors_of_today_are_trained_as_published() -> None:
    names = ("rtdetr-r18", "dfine-s", "dfine-n")
    r18, s, n = (load_config(RECIPES / name / "plain.yaml") for name in names)
    sides = [config.data.augmentation.shortest_sides for config in (r18, s, n)]
    repeated = [None if x is None else (len(x), x.count(640)) for x in sides]
    assert repeated == [(13, 3), (30, 20), None]
    ends = [config.data.augmentation.off_for_last_epochs for config in (r18, s, n)]
    assert ends == [1, 12, 12]
    millions = [count_parameters(build_detector(x.student.detector, 80)) / 1e6 for x in (s, n)]
    assert millions == pytest.approx([10.3, 3.8], abs=0.05)  # README of its code: 10, 4


def test_the_guide_has_every_recipe_and_its_steps() -> None:
    text, costs = (ROOT / "docs" / "coco.md").read_text().split("## Costs")
    told = set()
    for name, *counts in re.findall(r"^\| `coco/(\S+)` \|.*?([\d,]+) / ([\d,]+) \|", text, re.M):
        config = load_config(RECIPES / name)
        per_epoch = TRAIN_IMAGES // config.optimisation.batch_size
        assert [int(count.replace(",", "")) for count in counts] == [12 * per_epoch, 50 * per_epoch]
        told.add(name)
    own_length = r"^\| `coco/(\S+)` \|[^|]*\| (\d+): ([\d,]+) \|"
    for name, epochs, steps in re.findall(own_length, text, re.M):
        optimisation = load_config(RECIPES / name).optimisation
        assert optimisation.epochs == int(epochs)
        per_epoch = TRAIN_IMAGES // optimisation.batch_size
        assert int(steps.replace(",", "")) == int(epochs) * per_epoch
        told.add(name)
    assert told == set(recipes())
    counted = (ROOT / "docs" / "results" / "coco_costs.md").read_text()
    assert counted in costs and all(f"`coco/{name}`" in counted for name in told)
