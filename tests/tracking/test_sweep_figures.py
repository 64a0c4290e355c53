"""What a sweep shows: importance and cases."""

import math
from pathlib import Path

import numpy as np
import pytest

from d3etr.tracking.figures.style import save
from d3etr.tracking.figures.sweeps import draw_cases, draw_importance
from d3etr.tracking.importance import FEWEST_TRIALS, importance


def test_the_setting_that_decides_is_the_important_one() -> None:
    random = np.random.default_rng(0)
    points = [
        {"rate": float(rate), "noise": float(random.uniform()), "fixed": 1.0}
        for rate in random.uniform(0, 1, 40)
    ]
    found = importance(
        points, [math.sin(3 * p["rate"]) for p in points], ["rate", "noise", "fixed"]
    )
    assert found is not None
    shares, explained = found
    assert shares["rate"] > 0.9 and "fixed" not in shares, "what does not vary explains nothing"
    assert sum(shares.values()) == pytest.approx(1.0)
    assert explained > 0.9


def test_a_condition_that_does_not_hold_is_a_value_of_its_own() -> None:
    points = [{"kind": "a", "depth": i / 20} if i % 2 else {"kind": "b"} for i in range(20)]
    scores = [1.0 if point["kind"] == "a" else 0.0 for point in points]
    found = importance(points, scores, ["kind", "depth"])
    assert found is not None and found[1] > 0.9


def test_few_or_equal_trials_say_nothing() -> None:
    points = [{"rate": float(i)} for i in range(FEWEST_TRIALS)]
    assert importance(points[:-1], [1.0] * (FEWEST_TRIALS - 1), ["rate"]) is None
    assert importance(points, [1.0] * FEWEST_TRIALS, ["rate"]) is None


def test_figures_can_be_drawn_of_anything_that_sweeps_give(tmp_path: Path) -> None:
    figures = {
        "importance": draw_importance({"rate": 0.7, "kind": 0.3}, 0.8, 20),
        "cases": draw_cases({"plain": [0.18, 0.19], "D3ETR": [0.35, 0.36]}, "plain"),
    }
    for name, figure in figures.items():
        assert save(figure, tmp_path / f"{name}.png").stat().st_size > 5000
