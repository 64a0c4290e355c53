"""Sizes that suit a data set, and lengths that suit the time, by a clock of the test's own."""

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import save_untrained, tiny_detector_config

from d3etr.cli.main import main
from d3etr.config.data import DataConfig, DigitScenesConfig
from d3etr.config.load import load_config
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.engine.view_store import Forecast
from d3etr.errors import UserError
from d3etr.progress import no_progress
from d3etr.project.fit import SHARES, VIEWS, run_seconds, steps_within, with_views
from d3etr.project.make import Machine, Request, make_project
from d3etr.project.measure import Costs, DoesNotFit
from d3etr.project.recipes import DISTILLED, INHERITED, PLAIN, ROLES, TEACHER, resolved
from d3etr.project.sizes import exact_side, queries_for, rungs, size_bias_for, sizes_for
from d3etr.project.survey import Statistics
from d3etr.project.write import Project

BOARDS = Statistics(857, 5913, {"open": 1097}, 320, 320, 0.054, 14.3, 15)
CELLS = Statistics(292, 3941, {"red": 3348}, 640, 480, 0.184, 80.9, 30)
TWO_CORES, GPU = Machine(None, 2), Machine("a GPU", 8)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of COCO files: digit scenes of 32 pixels."""
    root = tmp_path_factory.mktemp("scenes")
    sizes = {"train_images": 24, "validation_images": 8, "test_images": 4, "image_size": 32}
    config = DigitScenesConfig(root=root, minimum_scale=8, maximum_scale=16, **sizes)
    place = write_digit_scenes(config)["train"].annotations
    assert isinstance(place, Path)
    return place.parent


class Clock:
    """Costs of steps that grow with their pixels."""

    def __init__(
        self, per_megapixel: float = 2.0, most_images: int = 10**6, teacher: float = 2.0
    ) -> None:
        self.per_megapixel, self.most_images = per_megapixel, most_images
        self.teacher = teacher
        self.asked: list[str] = []

    def __call__(self, trees: Mapping[str, Any], role: str, splits: Any) -> Costs:
        self.asked.append(role)
        tree = resolved(trees, role)
        images = tree["optimisation"]["batch_size"]
        if images > self.most_images:
            raise DoesNotFit(role)
        sizes = tree["data"]["preprocessing"]
        height, width = sizes.get("exact_size") or (sizes["shortest_side"], sizes["longest_side"])
        factor = {TEACHER: self.teacher, DISTILLED: 2.0}.get(role, 1.0)
        return Costs(self.per_megapixel * factor * images * height * width / 1e6, 1.0)


def make(
    folder: Path, data: Path, minutes: float = 60, machine: Machine = TWO_CORES, **more: Any
) -> Project:
    clock = more.pop("clock", Clock())
    request = Request(data, minutes, folder, "d3etr init", **more)
    return make_project(request, no_progress, machine=machine, measure=clock)


def test_sizes_suit_what_was_found_by_hand() -> None:
    boards, cells = (sizes_for(found, rungs(found)[-1]) for found in (BOARDS, CELLS))
    assert 150 <= boards.side <= 190 and boards.size_bias == pytest.approx(-2.9, abs=0.1)
    assert boards.queries == 50 and boards.scale == pytest.approx(1.4)
    assert cells.side == 160 and cells.size_bias == pytest.approx(-1.5, abs=0.1)
    assert cells.queries == 90
    assert cells.sides() == {"shortest_side": 120, "longest_side": 200}


def test_small_objects_get_larger_images_and_none_is_enlarged() -> None:
    sides = [rung.side for rung in rungs(BOARDS)]
    assert sides == sorted(sides, reverse=True) and len({*sides}) > 1 and sides[0] <= 320
    tiny = replace(BOARDS, width=4000, height=3000, smallest=20.0)
    assert rungs(tiny)[0].side == 640 and exact_side(tiny) == 640
    thumbnails = replace(BOARDS, width=64, height=64, smallest=30.0)
    assert sizes_for(thumbnails, rungs(thumbnails)[0]).scale == 1.0
    assert queries_for(replace(BOARDS, most_objects=900)) == 900
    assert size_bias_for(replace(BOARDS, relative_size=0.0)) < -5


def test_runs_fit_into_the_time_and_students_have_the_same(scenes: Path, tmp_path: Path) -> None:
    plan = make(tmp_path / "p", scenes, minutes=30).plan
    total = sum(plan.seconds(role) for role in ROLES)
    assert 0.97 * 30 * 60 <= total <= 30 * 60
    for role in ROLES:
        assert plan.seconds(role) <= SHARES[role] * 30 * 60
    assert plan.seconds(PLAIN) == pytest.approx(plan.seconds(DISTILLED), rel=0.05)
    assert plan.steps[PLAIN] == plan.steps[INHERITED] > plan.steps[DISTILLED]


def test_passes_of_the_teacher_are_stored_where_that_leaves_more_steps(
    scenes: Path, tmp_path: Path
) -> None:
    plan = make(tmp_path / "p", scenes, minutes=30).plan
    assert plan.design.views == VIEWS
    assert load_config(tmp_path / "p" / "distilled.yaml").teacher.views is not None
    # 24 images: the teacher's share of a step, for each of their views.
    costs, plain = plan.costs[DISTILLED], plan.costs[PLAIN]
    assert costs.preparation == pytest.approx(plain.step / plan.rung.batch * VIEWS * 24, rel=1e-6)
    few = with_views(Costs(1.0, 0.0), Costs(2.0, 0.0), images=100, batch=4)
    many = with_views(Costs(1.0, 0.0), Costs(2.0, 0.0), images=10_000, batch=4)
    live = steps_within(1020.0, Costs(2.0, 0.0), test=False)
    assert steps_within(1020.0, few, test=False) > live > steps_within(1020.0, many, test=False)


@pytest.mark.parametrize("why", ["free", "maximum_gigabytes"])
def test_passes_of_the_teacher_are_not_stored_where_they_have_no_room(
    why: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "free":
        full = SimpleNamespace(free=1000)
        monkeypatch.setattr("d3etr.engine.views.shutil.disk_usage", lambda folder: full)
    else:
        large = Forecast(total=21 * 10**9, missing=0, shards=(), shard_images=1)
        monkeypatch.setattr("d3etr.engine.views.ViewStore.forecast", lambda store: large)
    lines: list[str] = []
    request = Request(scenes, 30, tmp_path / "p", "d3etr init")
    plan = make_project(
        request, lambda text, *_: lines.append(text), machine=TWO_CORES, measure=Clock()
    ).plan
    assert plan.design.views == 0 and plan.costs[DISTILLED].preparation == 0
    assert load_config(tmp_path / "p" / "distilled.yaml").teacher.views is None
    [line] = [line for line in lines if "cannot be stored" in line]
    assert why in line and str(tmp_path / "p" / "runs") in line


def test_a_slow_machine_gets_smaller_images_and_a_doubt(scenes: Path, tmp_path: Path) -> None:
    quick = make(tmp_path / "quick", scenes, clock=Clock(1.0)).plan
    slow = make(tmp_path / "slow", scenes, clock=Clock(30.0)).plan
    assert slow.rung.batch < quick.rung.batch
    assert not quick.doubts
    [doubt] = make(tmp_path / "dear", scenes, clock=Clock(1.0, teacher=3.0)).plan.doubts
    assert "the teacher has fewer steps" in doubt
    assert any("--minutes" in text for text in slow.doubts)
    minutes = next(int(t.split("--minutes ")[1].split()[0]) for t in slow.doubts if "would" in t)
    assert (
        make(tmp_path / "longer", scenes, minutes + 1, clock=Clock(30.0)).plan.steps[PLAIN]
        >= 0.9 * slow.rung.steps
    )


def test_too_short_a_time_says_how_long_would_do(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give --minutes \d+") as refused:
        make(tmp_path / "p", scenes, minutes=2, clock=Clock(20.0))
    assert not (tmp_path / "p").exists()
    minutes = float(str(refused.value).rsplit(" ", 1)[1])
    assert make(tmp_path / "p", scenes, minutes=minutes, clock=Clock(20.0)).plan.steps[PLAIN] > 50


def test_nothing_is_written_over_or_half_written(scenes: Path, tmp_path: Path) -> None:
    clock = Clock()
    (tmp_path / "p").mkdir()
    with pytest.raises(UserError, match="is there already"):
        make(tmp_path / "p", scenes, clock=clock)
    assert not clock.asked  # said before minutes of measuring

    def broken(*arguments: object) -> Costs:
        raise UserError("an image is damaged")

    with pytest.raises(UserError, match="damaged"):
        make(tmp_path / "q", scenes, clock=broken)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_on_a_gpu_rt_detr_is_fine_tuned(scenes: Path, tmp_path: Path) -> None:
    clock = Clock(per_megapixel=0.01, most_images=8)
    project = make(tmp_path / "p", scenes, machine=GPU, clock=clock)
    assert project.plan.rung.batch == 8  # 16 did not fit
    names = {role: load_config(tmp_path / "p" / f"{role}.yaml") for role in ROLES}
    assert {config.student.detector.name for config in names.values()} == {"rt_detr"}
    backbones = [names[role].student.detector.backbone.name for role in (TEACHER, PLAIN)]
    assert backbones == ["resnet50vd", "resnet18vd"]
    assert names[TEACHER].student.detector.decoder_layers == 6
    assert "d3etr import-weights" in (tmp_path / "p" / "README.md").read_text()


def test_weights_of_the_users_are_fine_tuned(scenes: Path, tmp_path: Path) -> None:
    data = DataConfig(
        digit_scenes=DigitScenesConfig(
            root=tmp_path,
            **{
                "train_images": 2,
                "validation_images": 1,
                "test_images": 1,
                "image_size": 32,
                "minimum_scale": 8,
                "maximum_scale": 16,
            },
        )
    )
    files = {
        "teacher_weights": tmp_path / "t.safetensors",
        "student_weights": tmp_path / "s.safetensors",
    }
    save_untrained(files["teacher_weights"], tiny_detector_config(decoder_layers=3), data)
    save_untrained(files["student_weights"], tiny_detector_config(), data)
    make(tmp_path / "p", scenes, **files)
    student = load_config(tmp_path / "p" / "plain.yaml").student
    assert student.detector == tiny_detector_config()
    assert student.initialise_from is not None
    assert student.initialise_from.weights == files["student_weights"]
    save_untrained(files["student_weights"], tiny_detector_config(width=32), data)
    with pytest.raises(UserError, match="one kind and width"):
        make(tmp_path / "q", scenes, **files)
    with pytest.raises(UserError, match="go together"):
        make(tmp_path / "q", scenes, teacher_weights=files["teacher_weights"])


def test_costs_of_a_run_hold_its_evaluations() -> None:
    short = run_seconds(10, Costs(1.0, 5.0), test=False)
    assert run_seconds(10, Costs(1.0, 5.0), test=True) - short == 5.0


def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "nowhere"), "--minutes", "5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ") and "is not there" in line


@pytest.mark.parametrize("names", [("train", "test"), ("train",)])
def test_the_readme_says_which_part_was_divided(
    names: tuple[str, ...], scenes: Path, tmp_path: Path
) -> None:
    for name in names:
        shutil.copytree(scenes.parent / "images" / name, tmp_path / "data" / name)
        shutil.copy(scenes / f"{name}.json", tmp_path / "data" / f"{name}.json")
    text = make(tmp_path / "p", tmp_path / "data").folder.joinpath("README.md").read_text()
    assert "the data set has no validation of its own: images of 'train.json' were divided" in text
    assert ("(82 % / 18 % train, validation)" in text) is ("test" in names)
    assert ("- test is that of the data set\n" in text) is ("test" in names)
    assert "no splits" not in text
    data = load_config(tmp_path / "p" / "plain.yaml").data
    assert data.test is not None and data.test.annotations.name == "test.json"


def test_the_command_is_repeated_as_it_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []

    def refuse(request: Request, *_: object) -> Project:
        asked.append(request)
        raise UserError("nothing is made here")

    monkeypatch.setattr("d3etr.project.make.make_project", refuse)
    words = ["init", "photos", "--minutes", "5", "--follow-links", "--images", "a folder"]
    assert main(words) == 2
    assert asked[0].follow_links and asked[0].images == Path("a folder")
    assert asked[0].command == f"d3etr {shlex.join(words)}"
