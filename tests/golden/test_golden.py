"""The stored numbers hold: see ``record.py``."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from golden.record import NUMBERS, differences, instructions
from golden.subjects import SUBJECTS

PROCESSORS_DIFFER = 1e-4
"""Relative to numbers above 1."""
GRADIENTS = 0.01
"""After AdamW's first steps, which follow the signs of gradients; losses keep to the other."""
RUNS = {"digits_run", "sweep_table", "tracked_run"}
"""AdamW follows the signs of gradients, which rounding decides near 0."""
RUNS_ELSEWHERE = 0.3
"""On processors that do not have the recorded kind of vector instructions, and of the longest run,
which differs between makers of processors too: their libraries of matrix products do."""
LONGEST = "digits_run"
NEAR_TIES = 1e-3
"""Share of the numbers of training steps that may differ: rounding decides nearly equal costs of a
matching, and another pair has another loss."""
HAVE_RECORDED = {"AVX2", "AVX512"}
"""``record.py`` keeps to the narrower ones."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in RUNS else ()) for n in SUBJECTS],
)
def test_numbers_are_what_they_were(tmp_path: Path, name: str) -> None:
    expected = json.loads((NUMBERS / f"{name}.json").read_text())
    assert (NUMBERS / "instructions.txt").read_text().strip() == "AVX2"
    found = recorded(name, tmp_path)
    same = name not in RUNS or (instructions() in HAVE_RECORDED and name != LONGEST)
    tolerance = PROCESSORS_DIFFER if same else RUNS_ELSEWHERE
    changed = [
        (place, *pair)
        for place, *pair in differences(expected, found, tolerance)
        if "/gradients/" not in place or [*differences(*pair, GRADIENTS)]
    ]
    allowed = int(NEAR_TIES * count(expected)) if name == "training_steps" else 0
    assert len(changed) <= allowed, f"{len(changed)} numbers changed: {changed[:10]}"


def count(tree: Any) -> int:
    """Numbers and texts of a tree."""
    if isinstance(tree, dict):
        tree = [*tree.values()]
    return sum(map(count, tree)) if isinstance(tree, list) else 1


def recorded(name: str, folder: Path) -> Any:
    """The numbers of a process of its own, whose instructions are not this one's."""
    command = [sys.executable, str(NUMBERS.parent / "record.py"), str(folder), name]
    subprocess.run(command, check=True)
    return json.loads((folder / f"{name}.json").read_text())


def test_differences_are_found() -> None:
    tree = {"a": [1.0, 2.0], "b": {"c": 1000.0}, "d": "x"}
    assert not list(differences(tree, tree, 0.0))
    changed = {"a": [1.0, 2.1], "b": {"c": 1000.01}, "e": 1.0}
    assert [place for place, *_ in differences(tree, changed, 1e-4)] == ["/a/1", "/d", "/e"]
