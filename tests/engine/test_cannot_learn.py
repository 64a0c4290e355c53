"""A run that cannot learn says so, with suspects and what to set; others are silent."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import MakeConfig

from d3etr.config.load import validate
from d3etr.config.tree import Config
from d3etr.data.records import without_objects
from d3etr.data.splits import open_split
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.journal import Record, read_journal
from d3etr.engine.learning import CLASSES, FLAT, PLATEAU, ZERO, Finding, History, findings
from d3etr.engine.run import run_training
from d3etr.engine.suspects import Facts, facts_of, suspects
from d3etr.engine.watch import FINDING

BOARDS = Facts(3000, 0.054, 8.6, 2.0, 15, {"open": 900, "short": 12})
LEARNING = History([(s, 30 / (1 + s / 50)) for s in range(10, 2000, 10)], [(500, 0.1)], {})
PLACE = {"images": "photos", "annotations": "photos.json"}
GOOD: dict[str, Any] = {
    "data": {"train": PLACE, "validation": PLACE, "preprocessing": {"shortest_side": 160}},
    "student": {
        "detector": {
            "name": "deformable_detr",
            "backbone": {"name": "small"},
            "queries": 40,
            "width": 128,
            "box_size_bias": -2.9,
        }
    },
    "optimisation": {"steps": 3000, "learning_rate": 1e-3, "backbone_rate_factor": 1.0},
}


def recipe(*overrides: str) -> Config:
    return validate(GOOD, "the test", overrides)


def texts(found: list[Finding]) -> dict[str, str]:
    return {each.kind: each.text for each in found}


def overrides_in(text: str) -> list[str]:
    return re.findall(r"--set (\S+?=\S*?)(?=[;,.]?(?: |$))", text)


@pytest.mark.parametrize(
    ("override", "named", "fix"),
    [
        ("student.detector.box_size_bias=0", "50 % of the image's side", "box_size_bias=-2.9"),
        ("optimisation.learning_rate=1e-5", "learning rate 1e-05 is low", "learning_rate=0.001"),
        ("optimisation.learning_rate=0.02", "learning rate 0.02 is high", "learning_rate=0.004"),
        ("student.detector.queries=10", "10 queries cannot find the 15", "queries=50"),
        ("student.detector.queries=400", "400 queries for at most 15", "queries=50"),
        ("optimisation.backbone_rate_factor=0.1", "learns at 0.1", "backbone_rate_factor=1"),
        ("student.detector.backbone.name=resnet18", "frozen batch norm", "backbone.norm=group"),
        ("student.detector.backbone.trainable=false", "is frozen", "backbone.trainable=true"),
    ],
)
def test_what_keeps_a_run_from_learning_is_named_with_its_fix(
    override: str, named: str, fix: str
) -> None:
    history = History(LEARNING.losses, [(500, 0.0), (1000, 0.0)], {})
    found = texts(findings(history, recipe(override), BOARDS, 1000, ended=False))
    assert set(found) == {ZERO}
    assert "0.0 mAP" in found[ZERO] and named in found[ZERO] and fix in found[ZERO]
    # What is advised is a recipe, and with it the suspect is gone.
    advised = overrides_in(found[ZERO])
    assert advised
    again = suspects(False, recipe(override, *advised), BOARDS)
    assert not any(named in suspect.text for suspect in again)


def test_small_pictures_and_short_runs_are_suspects() -> None:
    facts = replace(BOARDS, pixels=3.0, enlarging=4.0)
    side, *rest = suspects(False, recipe(), facts)
    assert "3 pixels" in side.text and "data.preprocessing.shortest_side=427" in side.overrides
    assert not rest
    square = recipe(
        "data.preprocessing.shortest_side=null",
        "data.preprocessing.longest_side=null",
        "data.preprocessing.exact_size=[320, 320]",
    )
    assert suspects(False, square, facts)[0].overrides == (
        "data.preprocessing.exact_size=[864, 864]",
    )
    # Pictures that have no more pixels are not blamed.
    assert not suspects(False, recipe(), replace(facts, enlarging=1.0))
    short = suspects(False, recipe("optimisation.steps=200"), replace(BOARDS, steps=200))
    assert "optimisation.steps=3000" in short[0].overrides


def test_a_sound_recipe_has_no_suspects_and_a_look_at_labels_is_advised() -> None:
    assert not suspects(False, recipe(), BOARDS) and not suspects(True, recipe(), BOARDS)
    history = History([], [(1000, 0.0)], {})
    (found,) = findings(history, recipe(), BOARDS, 1000, ended=False)
    assert "d3etr check-data" in found.text


def test_a_run_that_learns_and_one_that_is_young_are_silent() -> None:
    assert not findings(LEARNING, recipe(), BOARDS, 1500, ended=True)
    nothing = History([], [(250, 0.0)], {})
    assert not findings(nothing, recipe(), BOARDS, 250, ended=False)
    assert not findings(nothing, recipe(), replace(BOARDS, steps=9000), 1500, ended=False)
    assert not findings(nothing, recipe(), BOARDS, 40, ended=True)
    assert findings(nothing, recipe(), BOARDS, 250, ended=True)
    assert not findings(History([], [], {}), recipe(), BOARDS, 2000, ended=True)  # never measured


def test_a_loss_that_does_not_fall_is_said_once_little_is_found() -> None:
    flat = History([(s, 20.0 + (s % 3)) for s in range(10, 1000, 10)], [(900, 0.02)], {})
    found = texts(
        findings(flat, recipe("optimisation.learning_rate=5e-3"), BOARDS, 990, ended=False)
    )
    assert set(found) == {FLAT} and "optimisation.learning_rate=0.001" in found[FLAT]
    tuned = replace(flat, maps=[(900, 0.4)])
    assert not findings(tuned, recipe(), BOARDS, 990, ended=False)


def test_a_plateau_is_told_from_slow_learning() -> None:
    still = [(s, 0.03) for s in range(100, 2001, 100)]
    found = texts(findings(replace(LEARNING, maps=still), recipe(), BOARDS, 2000, ended=False))
    assert set(found) == {PLATEAU} and "3.0 before step 1,200" in found[PLATEAU]
    rising = [(s, s / 40_000) for s in range(100, 2001, 100)]
    assert not findings(replace(LEARNING, maps=rising), recipe(), BOARDS, 2000, ended=False)
    good = [(s, 0.4) for s in range(100, 2001, 100)]
    assert not findings(replace(LEARNING, maps=good), recipe(), BOARDS, 2000, ended=False)


def test_classes_that_are_never_found_are_named() -> None:
    classes = {"open": 0.3, "short": 0.0}
    history = replace(LEARNING, classes=classes)
    assert not findings(history, recipe(), BOARDS, 900, ended=False)
    found = texts(findings(history, recipe(), BOARDS, 1600, ended=False))
    assert set(found) == {CLASSES}
    assert "short (12 objects to learn from)" in found[CLASSES] and "open (" not in found[CLASSES]
    unlearnt = replace(BOARDS, classes={"open": 900, "short": 0})
    assert not findings(history, recipe(), unlearnt, 1600, ended=False)


def test_history_reads_what_the_journal_has() -> None:
    lines = [
        '{"kind": "step", "step": 5, "metrics": {"train/loss": 3.0}}',
        '{"kind": "teacher", "step": 0, "metrics": {"teacher/mAP": 0.5}}',
        '{"kind": "evaluation", "step": 5, "metrics": {"val/mAP": 0.1, "val/AP/a": 0.2}}',
    ]
    records: list[Record] = [json.loads(line) for line in lines]
    assert History.of(records) == History([(5, 3.0)], [(5, 0.1)], {"a": 0.2})
    later = {"val/mAP": 0.1, "val/AP/a": 0.0, "val/AP/b": 0.0}
    lost = {"kind": "evaluation", "step": 9, "metrics": later}
    assert History.of([*records, lost]).classes == {"a": 0.2, "b": 0.0}, "a was found once"


def test_a_run_writes_its_findings_into_its_journal(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        {"epochs": 9, "learning_rate": 1e-9},
        {"every_epochs": 3},
        detector={"box_size_bias": -6.0},
        plain=True,
    )
    run_training(config, tmp_path, SingleProcess(torch.device("cpu")))
    found = [r for r in read_journal(tmp_path / "journal.jsonl") if FINDING in r]
    kinds = [record[FINDING] for record in found]
    assert kinds == [ZERO, FLAT] or kinds == [ZERO]
    assert found[0]["level"] == "warning" and found[0]["step"] == 54
    assert "after 54 of 54 steps" in found[0]["text"]
    assert "--set optimisation.learning_rate=0.001" in found[0]["text"]
    assert "--set student.detector.box_size_bias=" in found[0]["text"]


def test_facts_are_those_of_resized_images(make_config: MakeConfig) -> None:
    config = make_config(plain=True)
    split = open_split(config.data, "train")
    facts = facts_of(config, split, 12)
    assert facts is not None and facts.enlarging == 1.0 and facts.steps == 12
    assert facts.most_objects <= 3 and sum(facts.classes.values()) == len(split.objects.labels)
    assert facts.pixels == pytest.approx(32 * facts.relative_size, rel=0.5)
    empty = replace(split, records=tuple(without_objects(record) for record in split.records))
    assert facts_of(config, empty, 12) is None
