"""The stored numbers hold: see ``record.py``."""

import json
from pathlib import Path

import pytest
from golden.record import NUMBERS, differences, instructions
from golden.subjects import SUBJECTS

PROCESSORS_DIFFER = 1e-4
"""Relative to numbers above 1."""
RUNS = {"digits_run", "sweep_table", "tracked_run"}
"""AdamW follows the signs of gradients, which rounding decides near 0: their numbers are those of
processors with the recorded kind of vector instructions."""
RUNS_ELSEWHERE = 0.1


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in RUNS else ()) for n in SUBJECTS],
)
def test_numbers_are_what_they_were(tmp_path: Path, name: str) -> None:
    expected = json.loads((NUMBERS / f"{name}.json").read_text())
    found = json.loads(json.dumps(SUBJECTS[name](tmp_path)))
    elsewhere = (NUMBERS / "instructions.txt").read_text().strip() != instructions()
    tolerance = RUNS_ELSEWHERE if name in RUNS and elsewhere else PROCESSORS_DIFFER
    changed = list(differences(expected, found, tolerance))
    assert not changed, f"{len(changed)} numbers changed: {changed[:10]}"


def test_differences_are_found() -> None:
    tree = {"a": [1.0, 2.0], "b": {"c": 1000.0}, "d": "x"}
    assert not list(differences(tree, tree, 0.0))
    changed = {"a": [1.0, 2.1], "b": {"c": 1000.01}, "e": 1.0}
    assert [place for place, *_ in differences(tree, changed, 1e-4)] == ["/a/1", "/d", "/e"]
