"""How images are divided where classes are rare: shares of images first, then classes, evenly."""

from collections.abc import Sequence

import numpy as np
import pytest

from d3etr.data.records import ImageRecord
from d3etr.errors import UserError
from d3etr.project.splitting import FEWEST_IMAGES, SHARES, divide


def photos(classes: Sequence[Sequence[int]], crowd: bool = False) -> list[ImageRecord]:
    """An image for each list of classes, with an object of each."""
    return [
        ImageRecord(
            number,
            f"{number}.jpg",
            10,
            10,
            np.array(labels, dtype=np.int64),
            np.ones((len(labels), 4)),
            np.ones(len(labels)),
            np.full(len(labels), crowd),
        )
        for number, labels in enumerate(classes)
    ]


def sizes(parts: dict[str, list[ImageRecord]], label: int | None = None) -> tuple[int, ...]:
    """Images of each split; with ``label`` those that have that class."""
    return tuple(
        sum(label is None or label in record.labels for record in part) for part in parts.values()
    )


def test_classes_of_two_images_each_are_all_learnt_and_leave_images_to_measure() -> None:
    parts = divide(photos([[number // 2] for number in range(40)]))
    assert sizes(parts) == (28, 6, 6)
    assert all(sizes(parts, label)[0] >= 1 for label in range(20))


def test_many_rare_classes_beside_a_common_one_leave_shares_as_they_are() -> None:
    parts = divide(photos([[number // 2] for number in range(120)] + [[60]] * 10))
    assert sizes(parts) == (91, 20, 19)
    assert all(sizes(parts, label)[0] >= 1 for label in range(60))
    assert 6 <= sizes(parts, 60)[0] <= 8 and min(sizes(parts, 60)) >= 1


def test_what_is_there_once_is_learnt_where_there_is_room() -> None:
    parts = divide(photos([[number] for number in range(30)] + [[30]] * 270))
    assert sizes(parts) == (210, 45, 45)
    assert all(sizes(parts, label) == (1, 0, 0) for label in range(30))
    # More classes than images to learn from: some cannot be learnt.
    assert sizes(divide(photos([[number] for number in range(10)]))) == (7, 2, 1)


def test_images_of_many_classes_are_divided_evenly() -> None:
    draw = np.random.default_rng(0)
    rarer = 1 / np.arange(1, 41)
    rarer /= rarer.sum()
    images = [draw.choice(40, draw.integers(0, 8), p=rarer).tolist() for _ in range(400)]
    parts = divide(photos(images))
    assert sizes(parts) == pytest.approx((280, 60, 60), abs=1)
    for label in range(40):
        found = np.array(sizes(parts, label))
        assert np.abs(found - found.sum() * np.array([*SHARES.values()])).max() < 2.5, label


@pytest.mark.parametrize(("shown", "expected"), [(2, (1, 1, 0)), (3, (1, 1, 1)), (6, (4, 1, 1))])
def test_each_split_has_objects_where_enough_images_have(
    shown: int, expected: tuple[int, ...]
) -> None:
    parts = divide(photos([[0]] * shown + [[]] * (40 - shown)))
    assert sizes(parts, 0) == expected
    assert sum(sizes(parts)) == 40 and sizes(parts)[0] in (27, 28)


def test_a_crowd_is_no_object_to_divide_by() -> None:
    images = photos([[0]] * 30, crowd=True) + photos([[0]] * 3)
    parts = divide(images)
    assert [sum((~record.crowd).sum() for record in part) for part in parts.values()] == [1, 1, 1]


def test_a_division_depends_on_names_alone_and_on_the_shares_asked_for() -> None:
    images = photos([[number % 7] for number in range(50)])
    shares = {"train": 0.7, "validation": 0.15}
    parts, again = divide(images, shares), divide(images[::-1], shares)
    assert sizes(parts) == (41, 9)
    assert {r.id for r in parts["validation"]} == {r.id for r in again["validation"]}


def test_fewest_images_leave_one_for_each_split() -> None:
    assert sizes(divide(photos([[0]] * FEWEST_IMAGES))) == (7, 2, 1)
    with pytest.raises(UserError, match=r"found 9 images; .*train, validation, test: add some"):
        divide(photos([[0]] * 9))
