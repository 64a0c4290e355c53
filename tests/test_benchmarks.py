"""The benchmarks' own arithmetic, and that each of them runs."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks.__main__ import BENCHMARKS, main, parse
from benchmarks.coco_costs import costs
from benchmarks.growth import exponent
from benchmarks.profiled import main as profiled
from benchmarks.side_by_side import Comparison, alternate, per_second, scaled

CPU = torch.device("cpu")


def test_contenders_take_turns_and_each_round_begins_with_another() -> None:
    order: list[str] = []
    contenders = {name: lambda name=name: order.append(name) for name in "abc"}
    taken = alternate(contenders, 3, CPU)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in taken.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_taken_within_its_round() -> None:
    values = {"old": [10.0, 100.0, 20.0], "new": [5.0, 50.0, 40.0]}
    comparison = Comparison("T", "ms", values, "old", "at most 1")
    assert comparison.ratios("new") == [0.5, 0.5, 2.0]
    table = comparison.table()
    assert "| old | **20.0** (10.0 to 100) |  |" in table
    assert "| new | **40.0** (5.00 to 50.0) | **0.500** (0.500 to 2.00) |" in table
    assert "Asked: at most 1." in table


def test_units() -> None:
    assert scaled({"a": [0.5]}, 1000) == {"a": [500.0]}
    assert per_second({"a": [0.5]}, 8) == {"a": [16.0]}


def test_the_exponent_is_that_of_the_largest_sizes() -> None:
    assert exponent({100: 7.0, 300: 2.0, 900: 18.0}) == pytest.approx(2.0)


def test_an_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["plain_stepp"])
    assert "no benchmark 'plain_stepp'; there are plain_step, " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conditional-r18/plain.yaml", "conditional-r18/d3etr.yaml"])
def test_a_coco_recipe_is_counted(name: str) -> None:
    row = costs(name)
    assert row["images_at_once"] == 2
    assert row["saved_bytes_per_image"] > row["state_bytes"] / 10 > 0
    assert row["mean_step"]["operations"] > 1000


@pytest.mark.slow
def test_steps_are_profiled(capsys: pytest.CaptureFixture[str]) -> None:
    profiled(["--smoke", "--device", "cpu", "--rows", "5"])
    printed = capsys.readouterr().out
    assert "plain step" in printed and "D3ETR step" in printed
    assert printed.count("aten::convolution_backward") == 2


@pytest.mark.slow
def test_every_benchmark_runs(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = f"{repository / 'platform'}:{repository / 'tests'}"
    monkeypatch.setenv("PYTHONPATH", places)
    assert main(["--smoke", "--device", "cpu", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "benchmarks.json").read_text())
    assert written["benchmarks"].keys() == BENCHMARKS.keys()
    assert all(written["benchmarks"].values()), "each has a table"
    assert written["machine"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert (tmp_path / "growth.svg").stat().st_size > 10_000
    text = (tmp_path / "benchmarks.md").read_text()
    assert all(f"## {what[0].upper()}{what[1:]}" in text for what in BENCHMARKS.values())
