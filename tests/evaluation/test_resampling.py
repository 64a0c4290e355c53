"""Image sets drawn again, and the intervals of differences."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_coco_metrics import annotations, detections, measure, truth_of, write

from d3etr.evaluation.coco_metrics import SplitDetections
from d3etr.evaluation.resampling import (
    Resampled,
    draw_images,
    over_both,
    over_images,
    over_seeds,
    resampled_maps,
)


def split_detections(rows: np.ndarray) -> SplitDetections:
    ids, labels = rows[:, :2].astype(np.int64).T
    return SplitDetections(ids, labels, rows[:, 2], rows[:, 3:])


def repeated(path: Path, rows: np.ndarray, times: np.ndarray, folder: Path) -> float | None:
    """MAP of the set in which each image is written as often as ``times`` says."""
    content = json.loads(path.read_text())
    images, entries, found = [], [], []
    for image, count in zip(content["images"], times.tolist(), strict=True):
        for _ in range(count):
            number = 1000 + len(images)
            images.append(image | {"id": number})
            own = [each for each in content["annotations"] if each["image_id"] == image["id"]]
            entries += [each | {"image_id": number} for each in own]
            theirs = rows[rows[:, 0] == image["id"]].copy()
            theirs[:, 0] = number
            found.append(theirs)
    entries = [each | {"id": i} for i, each in enumerate(entries, start=1)]
    content |= {"images": images, "annotations": entries}
    folder.mkdir()
    other = folder / path.name
    other.write_text(json.dumps(content))
    return measure(truth_of(other), np.concatenate(found)).values["mAP"]


@pytest.mark.parametrize("seed", range(5))
def test_a_resampled_set_measures_as_the_set_written_out(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    entries = annotations(random)
    path = write(tmp_path / "a.json", entries)
    rows = detections(random, entries)
    rows[:, 2] = random.permutation(len(rows)) / len(rows)  # equal scores have no order
    truth = truth_of(path)
    times = draw_images(9, 6, seed)
    times[0] = 1
    maps = resampled_maps(truth, truth.match(split_detections(rows), 100), times)
    assert maps[0] == pytest.approx(measure(truth, rows).values["mAP"], abs=1e-12)
    expected = [repeated(path, rows, row, tmp_path / f"{d}") for d, row in enumerate(times)]
    np.testing.assert_allclose(maps, np.array(expected, dtype=float), atol=1e-12)


def test_draws_have_as_many_images_as_the_set_and_repeat() -> None:
    times = draw_images(50, 100, seed=3)
    assert (times.sum(1) == 50).all()
    assert (times == draw_images(50, 100, seed=3)).all()
    assert (times != draw_images(50, 100, seed=4)).any()


def drawn_around(maps: list[float], shared: np.ndarray) -> Resampled:
    """Runs whose draws of images differ by the same."""
    return Resampled(np.array(maps), np.array(maps)[:, None] + shared)


def test_seeds_are_judged_by_students_t() -> None:
    interval = over_seeds(np.array([0.02, 0.03, 0.04]))
    assert interval.mean == pytest.approx(0.03)
    assert interval.high - interval.mean == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-6)
    assert over_seeds(np.array([0.02])).low == -np.inf


@pytest.mark.parametrize(("seeds", "students"), [(3, True), (2, False)])
def test_two_contenders_seeds_are_judged_by_students_t_or_welchs(
    seeds: int, students: bool
) -> None:
    ours, theirs = np.array([0.42, 0.43, 0.47]), np.array([0.40, 0.41, 0.405])[:seeds]
    interval = over_seeds(ours, theirs)
    expected = stats.ttest_ind(ours, theirs, equal_var=students).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert over_seeds(ours, theirs[:1]).high == np.inf


def test_students_interval_bears_spreads_that_differ() -> None:
    """Three seeds each, one contender's spread twice the other's: 93.4 % by 200,000 draws."""
    random = np.random.default_rng(0)
    held = []
    for _ in range(4000):
        found = over_seeds(random.normal(0, 1, 3), random.normal(0, 2, 3))
        held.append(found.low <= 0 <= found.high)
    assert 0.92 <= np.mean(held) <= 0.95


def test_images_are_judged_by_percentiles() -> None:
    interval = over_images(drawn_around([0.2, 0.4], np.arange(-500, 501) / 1000))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.3, -0.175, 0.775))


def test_variances_of_seeds_and_images_add_up() -> None:
    of_images = np.random.default_rng(0).normal(0, 0.02, 100_000)
    alone = over_both(drawn_around([0.03, 0.03, 0.03], of_images))
    assert alone.high - alone.mean == pytest.approx(1.96 * 0.02, rel=0.02)
    seeds = [0.02, 0.03, 0.04]
    expected = over_seeds(np.array(seeds))
    both = over_both(drawn_around(seeds, np.zeros(10)))
    assert (both.low, both.high) == pytest.approx((expected.low, expected.high))
    wider = over_both(drawn_around(seeds, of_images))
    assert wider.high - wider.mean > max(alone.high - alone.mean, 0.02)


def test_what_images_do_to_single_runs_counts_once() -> None:
    """Of runs that are equal but for chance on each image, images alone say how sure a mean is."""
    random, found, seeds = np.random.default_rng(0), [], 4
    for _ in range(400):
        chance = random.normal(0, 0.02, (seeds, 1))  # of these images; others would differ
        drawn = chance + random.normal(0, 0.02, (seeds, 300))
        both = over_both(Resampled(chance[:, 0], drawn))
        found.append(both.low <= 0 <= both.high)
    assert 0.92 <= np.mean(found) <= 0.99


def test_common_hardness_of_images_cancels_between_contenders() -> None:
    shared = np.random.default_rng(0).normal(0, 0.1, 1000)
    ours, theirs = (drawn_around([m, m + 0.01], shared) for m in (0.5, 0.4))
    assert over_images(ours, theirs).low == pytest.approx(0.1)
    assert over_both(ours, theirs).mean == pytest.approx(0.1)
    below = theirs.below(0.5, 0.5 + shared)
    assert over_images(below).low == pytest.approx(0.095)
