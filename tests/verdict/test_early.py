"""What short runs decide: learning rates, and who is stopped. Nothing trains here."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tiny_recipe import tiny_recipe

from d3etr.engine.step_costs import StepCosts
from d3etr.errors import RunFailedError, UserError
from d3etr.evaluation.judge import Difference, Judgement, Standing
from d3etr.evaluation.resampling import Interval
from d3etr.launch.sweeps.results import TrialResult
from d3etr.verdict import run as verdict_run
from d3etr.verdict.contenders import make_contest
from d3etr.verdict.found import Found, Ran, Stage
from d3etr.verdict.run import Question
from d3etr.verdict.stages import Entry

COSTS = StepCosts(
    {"plain": 0.5, "inherited plain": 0.5, "predictions": 1.0, "distilled": 1.0},
    {"plain": 0.0, "inherited plain": 0.0, "predictions": 0.0, "distilled": 0.0},
    {},
)
ZERO = Interval(0.0, -0.1, 0.1)


class Staged(verdict_run._Verdict):
    """A verdict whose runs are made up: mAP by contender and rate."""

    def __init__(self, folder: Path, question: Question, maps: dict[tuple[str, float], float]):
        contest = make_contest(question.recipe, (), variants=question.variants)
        config = contest.ways[-1].config
        run = config.run.model_copy(update={"output": folder})
        base = config.model_copy(update={"run": run})
        self.said: list[str] = []
        super().__init__(question, contest, base, lambda text, *count: self.said.append(text))
        self.maps, self.behind = maps, tuple[str, ...]()
        self.stages: dict[str, list[Entry]] = {}

    def _costs(self, labelling: float) -> StepCosts:
        return COSTS

    def _announce(self, *arguments: Any) -> None:
        """Asks Ray how much room there is."""

    def _train(self, stage: str, entries: dict[str, Entry], seeds: Sequence[int]) -> list[Ran]:
        self.stages[stage] = [*entries.values()]
        self.seeds = seeds
        return [
            Ran(
                each,
                tuple(
                    TrialResult(cast(Any, None), "finished", Path("x"), {}, self.value(each), 1)
                    for _ in seeds
                ),
            )
            for each in entries.values()
        ]

    def value(self, each: Entry) -> float:
        return self.maps.get((each.way.name, each.rate), 0.2)

    def _judged(self, ran: Sequence[Ran], split: Any) -> Stage:
        gain = Difference(ZERO, ZERO, ZERO)
        standings = tuple(
            Standing(r.entry.way.name, r.entry.way.distilled, 0.1, (0.1,), gain, {}, {}, gain)
            for r in ran
        )
        return Stage(split, tuple(ran), Judgement(standings, "inherited plain", self.behind))


@pytest.fixture
def question(tmp_path: Path) -> Question:
    recipe = tmp_path / "taught.yaml"
    sections: dict[str, dict[str, Any]] = {
        "teacher": {"weights": "t.safetensors"},
        "distillation": {"method": "d3etr"},
    }
    recipe.write_text(tiny_recipe(**sections))
    return Question(recipe, (), 10.0, 3, (0.5, 1.0), False, None, {}, "d3etr verdict")


def find(staged: Staged) -> Found:
    return staged.find()


def test_each_contender_takes_its_own_best_rate(tmp_path: Path, question: Question) -> None:
    maps = {("plain", 0.5): 0.3, ("inherited plain", 1.0): 0.4, ("distilled", 0.5): 0.5}
    staged = Staged(tmp_path, question, maps)
    found = find(staged)
    assert found.rates == {"plain": 0.5, "inherited plain": 1.0, "distilled": 0.5}
    assert len(staged.stages["early"]) == 6
    assert {e.steps for e in staged.stages["early"] if e.way.distilled} == {150}
    assert [(e.way.name, e.rate, e.steps) for e in staged.stages["final"]] == [
        ("plain", 0.5, 1200),
        ("inherited plain", 1.0, 1200),
        ("distilled", 0.5, 600),
    ]
    assert found.early is None and found.final is not None


def test_one_rate_needs_no_short_runs(tmp_path: Path, question: Question) -> None:
    staged = Staged(tmp_path, replace(question, rates=(1.0,)), {})
    find(staged)
    assert list(staged.stages) == ["final"] and staged.seeds == (0, 1, 2)


def test_what_a_teacher_does_before_the_first_step_is_taken_off(
    tmp_path: Path, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = replace(COSTS, prepared=COSTS.prepared | {"distilled": 100.0})
    monkeypatch.setattr(Staged, "_costs", lambda self, labelling: stored)
    staged = Staged(tmp_path, replace(question, rates=(1.0,)), {})
    find(staged)
    assert [each.steps for each in staged.stages["final"]] == [1200, 1200, 500]


def test_who_cannot_win_is_stopped(tmp_path: Path, question: Question) -> None:
    staged = Staged(tmp_path, replace(question, rates=(1.0,), early=True), {})
    staged.behind = ("plain",)
    found = find(staged)
    assert [e.way.name for e in staged.stages["final"]] == ["inherited plain", "distilled"]
    assert found.early is not None and found.early.split == "validation"
    assert found.rates == {}, "nobody had a choice"
    assert "plain is stopped: it cannot win any more" in staged.said


def test_a_distilled_student_that_cannot_win_settles_it(tmp_path: Path, question: Question) -> None:
    staged = Staged(tmp_path, replace(question, rates=(1.0,), early=True), {})
    staged.behind = ("distilled",)
    found = find(staged)
    assert list(staged.stages) == ["early"] and found.final is None
    assert found.stage == found.early


def test_a_variant_that_can_still_win_is_trained_on(tmp_path: Path, question: Question) -> None:
    variants = {"predictions": ("distillation.self_attention.weight=0",)}
    asked = replace(question, rates=(1.0,), early=True, variants=variants)
    staged = Staged(tmp_path, asked, {})
    staged.behind = ("distilled", "plain")
    assert find(staged).final is not None
    assert [e.way.name for e in staged.stages["final"]] == ["inherited plain", "predictions"]


def test_without_a_finished_run_on_each_side_there_is_no_verdict(
    tmp_path: Path, question: Question
) -> None:
    staged = Staged(tmp_path, question, {})
    contest = make_contest(question.recipe, ())
    only = [Ran(Entry(way, 1.0, 9), ()) for way in contest.ways if way.distilled]
    failed = TrialResult(cast(Any, None), "failed", reason="no such weights")
    with pytest.raises(RunFailedError, match="no such weights"):
        staged._require_both(only, [failed])


def test_a_run_that_fails_is_counted_with_its_reason(
    tmp_path: Path, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = Staged(tmp_path, question, {})
    entries = {each.name: Entry(each, 1.0, 9) for each in staged._contest.ways}

    def trials(case: str) -> list[TrialResult]:
        trial = cast(Any, SimpleNamespace(case=case))
        done = [TrialResult(trial, "finished", Path("x"), {}, 0.2, 1) for _ in range(2)]
        failed = TrialResult(trial, "failed", reason="no such weights")
        return [*done, failed] if case == "plain" else done

    result = SimpleNamespace(trials=[each for name in entries for each in trials(name)])
    monkeypatch.setattr(verdict_run, "make_plan", lambda sweep: None)
    monkeypatch.setattr(verdict_run, "run_sweep", lambda plan, **options: result)
    ran = verdict_run._Verdict._train(staged, "final", entries, (0, 1, 2))
    assert len(ran) == len(entries)
    assert staged._failed == ["2 of 3 final runs of 'plain' finished: no such weights"]


def test_a_place_that_cannot_be_written_is_one_error(question: Question) -> None:
    staged = Staged(Path("/sys/runs"), question, {})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verdict_run, "on_a_worker", lambda *asked: COSTS)
        with pytest.raises(UserError, match="the verdict could not be written to /sys/runs"):
            verdict_run._Verdict._costs(staged, 0.0)


def test_a_contender_whose_teacher_takes_all_the_time_is_said_to_have_no_steps(
    tmp_path: Path, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = replace(COSTS, prepared=COSTS.prepared | {"distilled": 700.0})
    monkeypatch.setattr(Staged, "_costs", lambda self, labelling: stored)
    expected = "600 seconds less 700 for what its teacher does first are 0 steps of 'distilled'"
    with pytest.raises(UserError, match=expected):
        find(Staged(tmp_path, replace(question, rates=(1.0,)), {}))
