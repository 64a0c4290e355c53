"""The judge: what it says of contenders, and how often it is right on simulated ones."""

from dataclasses import replace

import numpy as np
import pytest
from benchmarks.judge import QUALITY, Setting, as_table, better_quality, simulate, tally
from simulated_detections import Scenes, contender, draw_scenes

from d3etr.errors import UserError
from d3etr.evaluation.coco_metrics import SplitDetections
from d3etr.evaluation.judge import Contender, judge
from d3etr.evaluation.resampling import draw_images, resampled_maps

DRAWS = 60


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(np.random.default_rng(0), 60)


def resampled(scenes: Scenes, detections: SplitDetections, times: np.ndarray) -> np.ndarray:
    return resampled_maps(scenes.truth, scenes.truth.match(detections, 100), times)


def runs(scenes: Scenes, name: str, quality: float, number: int, seeds: int = 3) -> Contender:
    return contender(np.random.default_rng(number), scenes, name, quality, seeds, 0.02)


def test_a_large_gain_is_found_and_is_a_loss_the_other_way_round(scenes: Scenes) -> None:
    weak, strong = runs(scenes, "plain", 0.0, 1), runs(scenes, "taught", 2.0, 2)
    found = judge(scenes.truth, [weak, strong], draws=DRAWS)
    gain = found.of("taught").gain
    assert found.rival == "plain" and found.of("plain").gain is None
    assert gain is not None and gain.answer == "gain"
    other = [replace(weak, distilled=True), replace(strong, distilled=False)]
    loss = judge(scenes.truth, other, draws=DRAWS).of("plain").gain
    assert loss is not None and loss.answer == "loss"
    assert (loss.both.low, loss.both.high) == pytest.approx((-gain.both.high, -gain.both.low))


def test_numbers_are_those_of_each_run_measured_alone(scenes: Scenes) -> None:
    plain, taught = runs(scenes, "plain", 1.0, 1), runs(scenes, "taught", 1.2, 2)
    found = judge(scenes.truth, [plain, taught], draws=DRAWS, seed=5)
    times = draw_images(60, DRAWS, 5)
    for each in (plain, taught):
        standing = found.of(each.name)
        alone = [scenes.truth.measure(d, 100) for d in each.detections]
        assert standing.maps == tuple(metrics.values["mAP"] for metrics in alone)
        small = np.mean([metrics.values["AP_small"] for metrics in alone])
        assert standing.sizes["AP_small"] == pytest.approx(small)
        cats = np.mean([metrics.per_class["cat"] for metrics in alone])
        assert standing.classes["cat"] == pytest.approx(cats)
    drawn = [
        np.mean([resampled(scenes, d, times) for d in c.detections], axis=0)
        for c in (taught, plain)
    ]
    gain = found.of("taught").gain
    assert gain is not None
    expected = np.quantile(drawn[0] - drawn[1], [0.025, 0.975])
    assert (gain.images.low, gain.images.high) == pytest.approx(tuple(expected))


def test_the_rival_is_chosen_on_validation_alone(scenes: Scenes) -> None:
    good = replace(runs(scenes, "good on test", 2.0, 1), validation=(0.3, 0.3), distilled=False)
    chosen = replace(runs(scenes, "good before", 0.0, 2), validation=(0.5, 0.5), distilled=False)
    taught = runs(scenes, "taught", 1.0, 3)
    found = judge(scenes.truth, [good, chosen, taught], draws=DRAWS)
    assert found.rival == "good before"
    assert found.best_distilled == found.of("taught")


def test_other_distilled_students_are_held_against_the_recipes_own(scenes: Scenes) -> None:
    plain, variant, ours = (
        runs(scenes, name, quality, number)
        for name, quality, number in (("plain", 0.0, 1), ("variant", 2.0, 2), ("ours", 1.0, 3))
    )
    plain = replace(plain, distilled=False)
    found = judge(scenes.truth, [plain, variant, ours], recipe="ours", draws=DRAWS)
    rivals = [replace(ours, distilled=False), variant]
    assert found.of("variant").change == judge(scenes.truth, rivals, draws=DRAWS).of("variant").gain
    assert found.of("plain").change is None and found.of("ours").change is None
    without = judge(scenes.truth, [plain, variant, ours], draws=DRAWS)
    assert without.of("variant") == replace(found.of("variant"), change=None)


def test_equal_runs_cannot_be_told_apart(scenes: Scenes) -> None:
    plain = runs(scenes, "plain", 1.0, 1)
    copy = replace(plain, name="copy", distilled=True)
    gain = judge(scenes.truth, [plain, copy], draws=DRAWS).of("copy").gain
    assert gain is not None
    assert gain.answer == "open" and gain.both.mean == 0
    assert gain.images.low == gain.images.high == 0


@pytest.mark.parametrize(("quality", "answer"), [(3.0, "gain"), (1.0, "open"), (-1.0, "loss")])
def test_a_teachers_lead_is_judged_too(scenes: Scenes, quality: float, answer: str) -> None:
    plain = runs(scenes, "plain", 1.0, 1)
    teacher = runs(scenes, "teacher", quality, 9, 1).detections[0]
    found = judge(scenes.truth, [plain], teacher, draws=DRAWS)
    assert found.lead is not None and found.lead.answer == answer
    expected = scenes.truth.measure(teacher, 100).values["mAP"]
    assert found.teacher == expected


def test_one_seed_and_no_rival_are_refused(scenes: Scenes) -> None:
    plain = runs(scenes, "plain", 1.0, 1)
    with pytest.raises(UserError, match=r"'taught' has 1 finished run.*at least 2 seeds"):
        judge(scenes.truth, [plain, runs(scenes, "taught", 1.0, 2, seeds=1)], draws=DRAWS)
    with pytest.raises(UserError, match="expected a plain student"):
        judge(scenes.truth, [replace(plain, distilled=True)], draws=DRAWS)


def test_the_interval_over_both_covers_and_the_gain_is_found() -> None:
    """``benchmarks.judge`` in small; docs/results/judge.md has more draws."""
    setting = Setting(points=6, images=120)
    better = better_quality(0.06, 30, 120)
    found = tally(setting, [simulate(setting, better, draw) for draw in range(25)])
    assert found.coverage["both"] >= 0.85
    assert found.answers["gain"] >= 0.7 and found.answers["loss"] == 0
    assert found.true_gain == pytest.approx(0.06, abs=0.015)
    assert "| 25 | 120 | 3 | " in as_table([found], "command")


def test_nothing_is_found_where_there_is_nothing() -> None:
    setting = Setting(points=0, images=120)
    found = tally(setting, [simulate(setting, QUALITY, draw) for draw in range(25)])
    assert found.answers["open"] >= 0.85
