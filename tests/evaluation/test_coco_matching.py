import numpy as np

from d3etr.evaluation.coco_metrics import Boxes, match, ranks

EVERYTHING = np.array([[0.0, 1e10]])
HALF = np.array([0.5])


def boxes(*rows: tuple[int, list[float]], crowd: tuple[int, ...] = ()) -> Boxes:
    """(pair, xywh) of each box, best first."""
    xywh = np.array([box for _, box in rows], dtype=np.float64).reshape(-1, 4)
    return Boxes(
        pair=np.array([pair for pair, _ in rows], dtype=np.int64),
        xywh=xywh,
        area=xywh[:, 2] * xywh[:, 3],
        score=np.linspace(1, 0, len(rows)),
        crowd=np.array([index in crowd for index in range(len(rows))], dtype=bool),
    )


def outcome(detections: Boxes, objects: Boxes, ranges: np.ndarray = EVERYTHING) -> str:
    """One letter per detection: T true, F false, i ignored."""
    found = match(detections, objects, ranges, HALF)
    pairs = zip(found.matched[0, 0], found.ignored[0, 0], strict=True)
    return "".join("i" if ignored else "T" if matched else "F" for matched, ignored in pairs)


def test_ranks_count_within_pairs() -> None:
    assert ranks(np.array([2, 2, 2, 5, 7, 7])).tolist() == [0, 1, 2, 0, 0, 1]
    assert ranks(np.array([], dtype=np.int64)).tolist() == []


def test_an_object_is_found_once() -> None:
    one = [0.0, 0, 10, 10]
    assert outcome(boxes((3, one), (3, one)), boxes((3, one))) == "TF"


def test_detections_of_other_images_or_classes_are_false() -> None:
    one = [0.0, 0, 10, 10]
    assert outcome(boxes((2, one), (3, one), (4, one)), boxes((3, one))) == "FTF"


def test_what_overlaps_too_little_finds_nothing() -> None:
    assert outcome(boxes((0, [0, 0, 10, 4])), boxes((0, [0, 0, 10, 10]))) == "F"


def test_of_equal_overlaps_the_last_is_taken() -> None:
    objects = boxes((0, [0, 0, 10, 10]), (0, [0, 0, 20, 5]))
    one = [0.0, 0, 10, 5]  # half of either; the first object is also within reach of the next
    assert outcome(boxes((0, one), (0, [0, 0, 10, 10])), objects) == "TT"


def test_a_crowd_takes_any_number_and_makes_nothing_of_them() -> None:
    crowd = boxes((0, [0, 0, 100, 100]), crowd=(0,))
    inside = boxes((0, [10, 10, 5, 5]), (0, [50, 50, 5, 5]), (0, [200, 200, 5, 5]))
    assert outcome(inside, crowd) == "iiF"


def test_a_real_object_comes_before_a_crowd_that_overlaps_more() -> None:
    objects = boxes((0, [0, 0, 10, 10]), (0, [0, 0, 30, 30]), crowd=(1,))
    assert outcome(boxes((0, [0, 0, 10, 12])), objects) == "T"


def test_what_is_outside_the_area_range_is_ignored() -> None:
    small = np.array([[0.0, 200.0]])
    objects = boxes((0, [0, 0, 10, 10]), (0, [50, 50, 20, 20]))
    detections = boxes(
        (0, [50, 50, 20, 20]),  # finds the large object
        (0, [80, 80, 20, 20]),  # large and finds nothing
        (0, [0, 0, 10, 10]),  # finds the small object
        (0, [90, 0, 10, 10]),  # small and finds nothing
    )
    assert outcome(detections, objects, small) == "iiTF"


def test_nothing_matches_nothing() -> None:
    nothing = boxes()
    assert outcome(nothing, nothing) == ""
    assert outcome(boxes((0, [0, 0, 1, 1])), nothing) == "F"
