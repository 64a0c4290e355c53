"""Steps that are measured, not kept."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from engine.test_views import placed, with_views
from tiny_runs import MakeConfig

from d3etr.config.distillation import MethodConfig
from d3etr.config.tree import Config
from d3etr.data.views import Arrays
from d3etr.engine import step_costs, view_store
from d3etr.engine.build import open_splits
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.step_costs import StepMaker, measure_step_costs
from d3etr.engine.view_records import ViewTeacher


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_costs, "ROUNDS", 2)
    monkeypatch.setattr(step_costs, "STEPS", 4)


def test_contenders_are_measured_in_turns_and_a_teacher_costs(make_config: MakeConfig) -> None:
    plain, taught = make_config(plain=True), make_config()
    teacher = taught.teacher
    assert teacher is not None
    gone = teacher.model_copy(update={"weights": Path("gone.safetensors")})
    broken = taught.model_copy(update={"teacher": gone})
    configs = {"plain": plain, "taught": taught, "broken": broken}
    costs = measure_step_costs(configs, SingleProcess())
    assert 0 < costs.seconds["plain"] < costs.seconds["taught"]
    assert set(costs.seconds) == {"plain", "taught"} == set(costs.prepared)
    assert "gone.safetensors" in costs.refused["broken"]
    assert costs.prepared == {"plain": 0.0, "taught": 0.0}


def test_stored_views_cost_the_same_whoever_made_them(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = 0
    look = ViewTeacher.records

    def counted(self: ViewTeacher, images: Sequence[int], view: int) -> list[Arrays]:
        nonlocal shown
        shown += len(images)
        return look(self, images, view)

    monkeypatch.setattr(ViewTeacher, "records", counted)
    monkeypatch.setattr(view_store, "seconds_on", lambda device: float(shown))
    monkeypatch.setattr(view_store, "TIMED_IMAGES", 8)
    configs = {f"{k} views": placed(with_views(make_config(), count=k), tmp_path) for k in (1, 3)}
    images = len(open_splits(configs["1 views"], SingleProcess()).train.records)
    for _ in "making", "there already":
        prepared = measure_step_costs(configs, SingleProcess()).prepared
        assert prepared == pytest.approx({"1 views": images, "3 views": 3 * images}, rel=0.01)


def numbers_of(config: Config, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of a run of ``steps`` that are made while it is measured."""
    made: list[int] = []
    whole = StepMaker.cost

    def watched(self: StepMaker, count: int, start: int) -> float:
        made.extend(range(start, start + count))
        return whole(self, count, start)

    monkeypatch.setattr(StepMaker, "cost", watched)
    optimisation = config.optimisation.model_copy(update={"epochs": None, "steps": steps})
    changed = config.model_copy(update={"optimisation": optimisation})
    measure_step_costs({"one": changed}, SingleProcess())
    return made


def test_all_parts_of_a_run_are_measured(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"method": "d3etr", "share_of_training": 0.5, "every_steps": 2}
    distillation = MethodConfig.parse(settings)
    config = make_config().model_copy(update={"distillation": distillation})
    made = numbers_of(config, 80, monkeypatch)[step_costs.WARM_UP_STEPS :]
    distils = [distillation.distils_at(step, 80) for step in made]
    assert sum(distils) == len(made) / 4, "as many as in the whole run"
