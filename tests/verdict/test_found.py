"""What a verdict says, from its numbers."""

import math
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from d3etr.cli.main import build_parser
from d3etr.cli.verdict import _command
from d3etr.engine.journal import Journal
from d3etr.engine.run_folder import RunFolder
from d3etr.engine.step_costs import StepCosts
from d3etr.evaluation.judge import Difference, Judgement, Standing
from d3etr.evaluation.resampling import Interval
from d3etr.launch.sweeps.results import TrialResult
from d3etr.verdict.found import Found, Ran, Stage
from d3etr.verdict.report import as_json, as_markdown, band_of, notes, results_table
from d3etr.verdict.stages import Entry

PLAIN = SimpleNamespace(teacher=None)
SIZES = {"AP_small": 0.1, "AP_medium": None, "AP_large": 0.5}


def around(mean: float, half: float) -> Difference:
    interval = Interval(mean, mean - half, mean + half)
    return Difference(interval, interval, interval)


def ran(name: str, seconds: float, prepared: float = 0.0) -> Ran:
    summary = {"training_cpu_seconds": seconds}
    trials = [
        TrialResult(cast(Any, None), "finished", Path(f"{name}-{k}"), summary, 0.4, 1)
        for k in range(2)
    ]
    way = cast(Any, SimpleNamespace(name=name, distilled=name == "distilled", config=PLAIN))
    return Ran(Entry(way, 1.0, 100, prepared), tuple(trials))


def found(gain: Difference, lead: Difference, seconds: float = 60.0) -> Found:
    standings = tuple(
        Standing(name, name == "distilled", 0.4, (mAP, mAP), around(mAP, 0.02), SIZES, {}, over)
        for name, mAP, over in (
            ("plain", 0.3, around(-0.1, 0.02)),
            ("inherited plain", 0.4, None),
            ("distilled", 0.4 + gain.both.mean, gain),
        )
    )
    teacher = 0.4 + lead.both.mean
    judgement = Judgement(standings, "inherited plain", ("plain",), teacher, lead)
    runs = tuple(ran(each.name, seconds) for each in standings)
    costs = StepCosts({"plain": 0.6, "inherited plain": 0.6, "distilled": 0.6}, {}, {})
    stage = Stage("test", runs, judgement)
    return Found("d3etr verdict x", Path("folder"), 1.0, costs, {}, final=stage)


@pytest.mark.parametrize(
    ("gain", "opening"),
    [
        (around(0.04, 0.02), "Distilling pays: 'distilled' reaches 44.0 mAP, +4.0 (95 % interval "),
        (around(-0.04, 0.02), "Distilling does not pay: "),
        (around(0.01, 0.02), "No gain from distilling can be told: "),
    ],
)
def test_the_first_sentence_is_the_answer(gain: Difference, opening: str) -> None:
    said = found(gain, around(0.1, 0.05)).sentence
    assert said.startswith(opening)
    assert "over 'inherited plain' in the same 1 minutes of CPU time a run" in said
    assert said.endswith("; the teacher (50.0 mAP) leads 'inherited plain' by 10.0.")


@pytest.mark.parametrize(
    ("lead", "ending"),
    [
        (around(-0.03, 0.01), "the teacher (37.0 mAP) does not lead 'inherited plain' (40.0)."),
        (around(0.03, 0.05), "does not lead 'inherited plain' (40.0), as far as these images and "),
    ],
)
def test_a_teacher_that_does_not_lead_is_in_it(lead: Difference, ending: str) -> None:
    said = found(around(0.04, 0.02), lead).sentence
    assert ending in said and said.count(". ") == 0


def test_times_that_differ_are_said_and_shared_splits_too() -> None:
    equal = found(around(0.04, 0.02), around(0.1, 0.05))
    assert notes(equal) == []
    later = found(around(0.04, 0.02), around(0.1, 0.05), seconds=75.0)
    assert any("'plain' took 75 s of CPU time where 60 were meant" in note for note in notes(later))
    assert equal.final is not None
    shared = replace(equal, final=replace(equal.final, split="validation"))
    assert any("share validation" in note for note in notes(shared))


def test_variants_are_held_against_the_recipe_where_there_are_any() -> None:
    whole = found(around(0.04, 0.02), around(0.1, 0.05))
    table = results_table(whole)
    assert len(table.headings) == len(table.rows[0]) and "over 'distilled'" not in table.headings
    assert whole.final is not None
    judgement, (*others, own) = whole.final.judgement, whole.final.judgement.standings
    variant = replace(own, name="variant", change=around(0.011, 0.003))
    judged = replace(judgement, standings=(*others, variant, own))
    stage = replace(whole.final, ran=(*whole.final.ran, ran("variant", 60.0)), judgement=judged)
    costs = replace(whole.costs, seconds=whole.costs.seconds | {"variant": 0.6})
    table = results_table(replace(whole, final=stage, costs=costs))
    place = table.headings.index("over 'distilled'")
    shown = {row[0]: row[place : place + 2] for row in table.rows}
    assert shown["variant"] == ("+1.1", "+0.8 to +1.4") and shown["plain"] == ("-", "-")
    assert {len(row) for row in table.rows} == {len(table.headings)}


def test_what_labelling_took_is_said() -> None:
    whole = found(around(0.04, 0.02), around(0.1, 0.05))
    assert whole.final is not None
    runs = (*whole.final.ran, ran("pseudo-labels", 51.0, 9.0))
    costs = replace(whole.costs, seconds=whole.costs.seconds | {"pseudo-labels": 0.51})
    labelled = replace(whole, final=replace(whole.final, ran=runs), costs=costs)
    assert notes(labelled) == ["9 s of 'pseudo-labels' went into the teacher's labels."]
    assert "in the same 1 minutes of CPU time a run" in labelled.sentence


def test_times_that_differ_are_in_the_sentence() -> None:
    early = found(around(0.04, 0.02), around(0.1, 0.05), seconds=15.0)
    assert early.final is not None
    stage = replace(early.final, ran=(*early.final.ran, ran("pseudo-labels", 15.0, 9.0)))
    assert "over 'inherited plain' in 0.25 to 0.4 minutes of CPU time a run" in stage.sentence


def test_a_curve_begins_after_what_the_teacher_did_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    each = ran("pseudo-labels", 60.0, 30.0)
    for folder, mAP in zip(each.folders, (0.2, 0.4), strict=True):
        folder.mkdir()
        journal = Journal(RunFolder(folder).journal)
        for step in (50, 100):
            journal.write("evaluation", step=step, metrics={"val/mAP": mAP * step / 100})
    band = band_of(each)
    assert band is not None
    assert [3600 * hour for hour in band.hours] == pytest.approx([60.0, 90.0])
    assert list(band.means) == pytest.approx([0.15, 0.3])


def test_a_contender_that_cannot_win_is_stopped_but_never_the_rival() -> None:
    stage = found(around(0.04, 0.02), around(0.1, 0.05)).stage
    assert stage.stopped == ("plain",)
    behind = replace(stage.judgement, behind=("plain", "inherited plain"))
    assert replace(stage, judgement=behind).stopped == ("plain",)


def test_what_is_settled_early_says_so() -> None:
    whole = found(around(-0.04, 0.02), around(0.1, 0.05))
    early = replace(whole, early=whole.final, final=None)
    assert early.sentence.startswith("Settled early, the full runs were left out. Distilling does")
    assert as_json(early)["settled_early"] is True
    assert early.early is not None
    short = replace(early, early=replace(early.early, split="validation"))
    [caution] = notes(short)
    assert caution.startswith("Short runs are judged on validation"), "no word on other splits"


def test_runs_that_failed_are_in_the_verdict() -> None:
    whole = found(around(0.04, 0.02), around(0.1, 0.05))
    said = "0 of 3 final runs of 'plain, rate x 1' finished: no such weights"
    assert said in as_markdown(replace(whole, failed=(said,)))


def test_table_and_markdown_have_every_contender() -> None:
    whole = found(around(0.04, 0.02), around(0.1, 0.05))
    rows = results_table(whole).rows
    assert [row[0] for row in rows] == ["plain", "inherited plain", "distilled"]
    assert rows[0][3:6] == ("-10.0", "-12.0 to -8.0", "loss")
    assert rows[1][3:6] == ("-", "-", "the rival")
    assert rows[2][6:] == ("10.0 / - / 50.0", "100", "1.00", "60")
    text = as_markdown(whole)
    assert text.startswith(f"# {whole.sentence}\n\n`d3etr verdict x`\n")
    assert "| distilled | 44.0 | 42.0 to 46.0 | +4.0 | +2.0 to +6.0 | gain |" in text
    values = as_json(whole)
    assert values["answer"] == "gain" and len(values["contenders"]) == 3
    assert math.isclose(values["contenders"][2]["gain"]["both"]["low"], 0.02)


def test_the_command_asks_for_the_same_to_the_last_digit() -> None:
    given = ["verdict", "digits/d3etr", "--minutes", "1234567.8", "--rates", "0.33333333", "1"]
    command = shlex.split(_command(build_parser().parse_args(given)))
    again = build_parser().parse_args(command[1:])
    assert (again.minutes, again.rates) == (1234567.8, [0.33333333, 1.0])
