"""What exporters and cameras get wrong is named with counts and an example; good data is not."""

import numpy as np
import pytest
from coco_files import annotation, picture
from PIL import Image

from d3etr.config.data import DataConfig
from d3etr.data.checks import check_data

SIZE = (90, 60)
IMAGES = 12


def good_boxes(per_image: int = 4) -> list[list[float]]:
    """[x, y, width, height] of boxes anywhere in a picture, image after image."""
    random = np.random.default_rng(3)
    sizes = random.uniform(6, 40, (IMAGES * per_image, 2))
    return np.c_[random.uniform(0, 1, sizes.shape) * (np.array(SIZE) - sizes), sizes].tolist()


def entries(boxes, **more):
    return [
        annotation(n, 1 + n % IMAGES, (0, 3, 7)[n % 3], box, **more) for n, box in enumerate(boxes)
    ]


@pytest.fixture
def warnings(write_split):
    """All warnings of a check, where validation is good."""

    def check(annotations, *, prepare=None, **changes):
        train = write_split([SIZE] * IMAGES, annotations, **changes)
        categories = {"categories": changes["categories"]} if "categories" in changes else {}
        validation = write_split(
            [SIZE] * IMAGES, entries(good_boxes()), name="validation", **categories
        )
        if prepare is not None:
            prepare(train.images)
        report = check_data(DataConfig(train=train, validation=validation))
        of_splits = [text for split in report.splits for text in split.warnings]
        return "\n".join([*of_splits, *report.warnings])

    return check


def test_nothing_is_said_of_good_data(warnings):
    assert warnings(entries(good_boxes())) == ""


def test_single_odd_boxes_are_in_every_data_set(warnings):
    boxes = good_boxes(10)
    boxes[5], boxes[6] = [0, 0, *SIZE], [3, 3, 1, 1]
    assert warnings(entries(boxes)) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y, w, h: [x / 90, y / 60, w / 90, h / 60], "fractions of the image"),
        (lambda x, y, w, h: [x, y, x + w, y + h], "read as [x1, y1, x2, y2] 100% of them fit"),
        (lambda x, y, w, h: [y, x, y + h, x + w], "read as [y1, x1, y2, x2]"),
        (lambda x, y, w, h: [x + w / 2, y + h / 2, w, h], "read as [centre x, centre y"),
        (lambda x, y, w, h: [y, x, h, w], "read as [y, x, height, width]"),
        (lambda x, y, w, h: [2 * x, 2 * y, 2 * w, 2 * h], "pixels of a larger image"),
        (lambda x, y, w, h: [x / 2, y / 2, w / 2, h / 2], "pixels of a smaller image"),
    ],
)
def test_boxes_in_another_convention_are_recognised(warnings, change, words):
    found = warnings(entries([change(*box) for box in good_boxes()]))
    assert words in found and "image id" in found
    assert found.count("\n") <= 1, found


def test_boxes_that_are_there_twice_are_counted(warnings):
    annotations = entries(good_boxes())
    again = [{**entry, "id": 1000 + entry["id"]} for entry in annotations[:5]]
    assert "5 of 53 boxes repeat another of the same class and image" in warnings(
        annotations + again
    )


def test_classes_that_only_spelling_tells_apart_and_backgrounds_are_named(warnings):
    names = {0: "Traffic light", 3: "traffic_lights", 7: "background"}
    categories = [{"id": number, "name": name} for number, name in names.items()]
    found = warnings(entries(good_boxes()), categories=categories)
    assert "'Traffic light', 'traffic_lights' differ in spelling alone" in found
    assert "'background' looks like no object" in found


def test_a_class_that_validation_lacks_against_all_odds_is_named(write_split):
    boxes = entries(good_boxes())
    train = write_split([SIZE] * IMAGES, boxes)
    cats = [entry | {"category_id": 0} for entry in boxes]
    validation = write_split([SIZE] * IMAGES, cats, name="validation")
    (found,) = check_data(DataConfig(train=train, validation=validation)).warnings
    assert "validation has no box of dog, cup, train has 32" in found


def test_pixels_that_cannot_be_meant_so_are_named(warnings):
    def spoil(folder):
        Image.new("RGB", SIZE, (0, 0, 0)).save(folder / "1.png")
        twelve_bits = np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE[::-1]) % 4096
        Image.fromarray(twelve_bits).save(folder / "2.png")
        picture(*SIZE).convert("L").save(folder / "5.png")
        picture(*SIZE).convert("P").save(folder / "6.png")

    found = warnings(entries(good_boxes()), prepare=spoil)
    assert "2 images have hardly any contrast (image ids 1, 2)" in found
    assert found.count("\n") == 0


@pytest.mark.parametrize(
    ("written", "there", "words"),
    [
        ("batch1\\1.png", "batch1/1.png", r"batch1\1.png has backslashes"),
        ("a.JPG", "a.jpg", "'a.jpg' is there: names differ in case"),
        (
            "cafe\u0301.png",
            "caf\u00e9.png",
            "is there: names differ in case, spaces or the Unicode",
        ),
        ("a.png ", "a.png", "'a.png' is there: names differ"),
        ("train/a.png", "a.png", "a.png is there, without train/"),
    ],
)
def test_names_that_nearly_fit_are_explained(write_split, written, there, words):
    def change(content):
        content["images"][0]["file_name"] = written

    split = write_split([SIZE], entries(good_boxes()[:1]), change=change)
    (split.images / there).parent.mkdir(exist_ok=True)
    (split.images / "1.png").rename(split.images / there)
    report = check_data(DataConfig(train=split, validation=split))
    (error,) = report.splits[0].errors
    assert words in error and written in error and "image id 1" in error
