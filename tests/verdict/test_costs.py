"""What is measured before a verdict's runs. Nothing trains here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_recipe import tiny_recipe

from d3etr.config.tree import Config
from d3etr.engine.step_costs import StepCosts
from d3etr.verdict import run as verdict_run
from d3etr.verdict.contenders import make_contest
from d3etr.verdict.run import Question


@pytest.fixture
def verdict(tmp_path: Path) -> verdict_run._Verdict:
    recipe = tmp_path / "taught.yaml"
    sections: dict[str, dict[str, Any]] = {
        "teacher": {"weights": "t.safetensors"},
        "distillation": {"method": "d3etr"},
    }
    recipe.write_text(tiny_recipe(**sections))
    question = Question(recipe, (), 10.0, 3, (1.0,), False, None, {}, "d3etr verdict")
    contest = make_contest(recipe, ())
    config = contest.ways[-1].config
    base = config.model_copy(
        update={"run": config.run.model_copy(update={"output": tmp_path / "runs"})}
    )
    return verdict_run._Verdict(question, contest, base, lambda text, *count: None)


def test_who_was_refused_is_measured_again(
    verdict: verdict_run._Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, missing = list[set[str]](), {"distilled"}

    def measure(_: Any, call: Callable[..., Any], configs: dict[str, Config]) -> StepCosts:
        asked.append({*configs})
        there = {name: float(len(asked)) for name in configs if name not in missing}
        return StepCosts(there, dict.fromkeys(there, 0.0), dict.fromkeys(missing, "not there"))

    monkeypatch.setattr(verdict_run, "on_a_worker", measure)
    assert verdict._costs(0.0).refused == {"distilled": "not there"}
    missing.clear()  # as when the teacher's file was put in its place
    costs = verdict._costs(0.0)
    assert costs.refused == {} and costs.seconds["distilled"] == 2.0
    assert costs.seconds["plain"] == 1.0, "the steps of those that may have run already"
    assert verdict._costs(0.0) == costs
    assert asked == [{"plain", "inherited plain", "distilled"}, {"distilled"}]
