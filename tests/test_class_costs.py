"""``benchmarks.class_costs`` in small; docs/results/class-costs.md has the numbers."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks.class_costs import COSTS, Comparison, Found, as_table, main


def test_partners_are_those_of_minimal_cost() -> None:
    costs = torch.tensor([[[[3.0, 1.0], [1.0, 9.0], [0.5, 9.0]]]])  # three students, two teachers
    assert Comparison([]).partners(costs, 2).tolist() == [[[2, 0]]]
    few = torch.tensor([[[[3.0, 1.0, 2.0]]]])
    assert Comparison([]).partners(few, 3).tolist() == [[[-1, 0, -1]]]


def test_the_best_of_a_row_is_bold() -> None:
    rows = [Found("A", "B", cost, 0.1 * n, 0.5) for n, cost in enumerate(COSTS)]
    text = as_table(rows, "command")
    assert "| A | B | 0.0 | 10.0 | 20.0 | 30.0 | 40.0 | 50.0 | **60.0** |" in text


def test_it_measures_all_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--steps", "8", "--images", "8", "--scenes", "16", "--table", str(tmp_path)])
    rows = json.loads((tmp_path / "class-costs.json").read_text())
    assert len(rows) == 2 * 2 * 2 * len(COSTS)
    assert all(0 <= row["same"] <= 1 and 0 <= row["overlap"] <= 1 for row in rows)
    assert (tmp_path / "class-costs.md").read_text() in capsys.readouterr().out
