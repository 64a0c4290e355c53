"""The stored numbers hold: see ``record.py``."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from golden.record import NUMBERS, differences, instructions
from golden.subjects import SUBJECTS

PROCESSORS_DIFFER = 1e-4
"""Relative to numbers above 1."""
RUNS = {"digits_run", "sweep_table", "tracked_run"}
"""AdamW follows the signs of gradients, which rounding decides near 0: their numbers are those of
processors with the recorded kind of vector instructions."""
RUNS_ELSEWHERE = 0.1
X86 = {"AVX2", "AVX512"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in RUNS else ()) for n in SUBJECTS],
)
def test_numbers_are_what_they_were(tmp_path: Path, name: str) -> None:
    expected = json.loads((NUMBERS / f"{name}.json").read_text())
    recorded = (NUMBERS / "instructions.txt").read_text().strip()
    found = recorded_with(recorded, name, tmp_path)
    elsewhere = recorded != instructions()
    tolerance = RUNS_ELSEWHERE if name in RUNS and elsewhere else PROCESSORS_DIFFER
    changed = list(differences(expected, found, tolerance))
    assert not changed, f"{len(changed)} numbers changed: {changed[:10]}"


def recorded_with(kind: str, name: str, folder: Path) -> Any:
    """The numbers in a process that computes with the recorded kind of instructions.

    Others round otherwise, which decides near ties of a matching.
    """
    wanted = {"ATEN_CPU_CAPABILITY": kind.lower()} if instructions() in X86 else {}
    command = [sys.executable, str(NUMBERS.parent / "record.py"), str(folder), name]
    subprocess.run(command, check=True, env=os.environ | wanted)
    return json.loads((folder / f"{name}.json").read_text())


def test_differences_are_found() -> None:
    tree = {"a": [1.0, 2.0], "b": {"c": 1000.0}, "d": "x"}
    assert not list(differences(tree, tree, 0.0))
    changed = {"a": [1.0, 2.1], "b": {"c": 1000.01}, "e": 1.0}
    assert [place for place, *_ in differences(tree, changed, 1e-4)] == ["/a/1", "/d", "/e"]
