import json

import numpy as np
from coco_files import annotation, picture
from PIL import Image

from d3etr.config.data import DataConfig, DigitScenesConfig
from d3etr.data.checks import check_data


def _check(write_split, sizes, annotations, *, prepare=None, **changes):
    train = write_split(sizes, annotations, **changes)
    validation = write_split([(20, 20)], [annotation(1, 1, 0, [1, 1, 9, 9])], name="validation")
    if prepare is not None:
        prepare(train.images)
    return check_data(DataConfig(train=train, validation=validation))


GOOD = [annotation(1, 1, 0, [1, 1, 9, 9])]


def test_a_good_data_set_is_fit_to_train(write_split):
    report = _check(write_split, [(40, 30), (40, 40)], [*GOOD, annotation(2, 1, 7, [0, 0, 36, 30])])
    assert report.ok
    train = report.splits[0]
    facts = train.facts
    assert (facts["images"], facts["boxes"]) == (2, 2)
    assert facts["boxes_per_category"] == {"cat": 1, "dog": 0, "cup": 1}
    assert facts["object_sizes"] == {"small": 1, "medium": 1, "large": 0}
    assert facts["without_objects"] == (2,)
    assert facts["image_sizes"] == {"40 x 30": 1, "40 x 40": 1}
    assert "categories without a box to learn from: dog" in train.warnings
    assert report.text().endswith("ready to train")


def test_everything_that_is_dropped_or_set_aside_is_listed_by_id(write_split):
    boxes = [
        *GOOD,
        annotation(21, 1, 0, [1, 1, 0, 9]),
        annotation(22, 1, 0, [99, 1, 5, 5]),
        annotation(23, 1, 0, [-2, 1, 5, 5]),
        annotation(24, 1, 0, [2, 1, 5, 5], iscrowd=1),
    ]
    report = _check(write_split, [(40, 30)], boxes)
    train = report.splits[0]
    assert report.ok
    kinds = ("zero_size", "outside", "clipped", "crowd")
    assert [train.facts[kind] for kind in kinds] == [(21,), (22,), (23,), (24,)]
    assert "annotation ids 21" in report.text()


def test_damaged_images_are_errors(write_split):
    def prepare(folder):
        picture(40, 30).convert("L").save(folder / "1.png")
        noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "5.png", format="JPEG")
        (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:900])
        (folder / "6.png").unlink()
        picture(41, 30).save(folder / "7.png")

    report = _check(write_split, [(40, 30)] * 8, GOOD, prepare=prepare)
    assert not report.ok
    missing, damaged, other_size = report.splits[0].errors
    assert "(image id 6)" in missing and damaged.startswith("image id 5: ")
    assert "image id 7: is 41 x 30, annotated 40 x 30" in other_size
    assert "training would fail" in report.text()


def test_an_unusable_annotation_file_does_not_hide_the_other_splits(write_split):
    report = _check(write_split, [(40, 30)], [annotation(1, 5, 0, [1, 1, 3, 3])])
    assert not report.ok
    assert "image_id 5" in report.splits[0].errors[0]
    assert report.splits[1].errors == () and report.splits[1].facts["boxes"] == 1


def test_categories_that_differ_between_splits_are_an_error(write_split):
    other = [{"id": 0, "name": "cat"}]
    report = _check(write_split, [(40, 30)], GOOD, categories=other)
    assert not report.ok
    assert "only in validation: dog (id 3), cup (id 7)" in report.errors[0]


def test_a_split_without_any_object_is_an_error(write_split):
    assert "nothing to learn" in _check(write_split, [(40, 30)], []).splits[0].errors[0]


def test_images_in_two_splits_are_a_warning(write_split):
    def copy(folder):
        original = folder.parent / "validation" / "1.png"
        (folder / "2.png").write_bytes(original.read_bytes())

    report = _check(write_split, [(40, 30), (20, 20)], GOOD, prepare=copy)
    assert report.ok
    assert "1 images are in train and in validation" in report.warnings[0]
    assert "image ids in train: 2" in report.warnings[0]


def test_images_that_are_twice_in_a_split_are_a_warning(write_split):
    def change(content):
        content["images"][1]["file_name"] = "1.png"

    report = _check(write_split, [(40, 30), (40, 30)], GOOD, change=change)
    assert "1 images are in train and in it more than once" in report.warnings[0]


def test_the_report_is_json_with_every_id(write_split):
    boxes = [*GOOD, *(annotation(n, 1, 0, [1, 1, 0, 0]) for n in range(10, 40))]
    content = json.loads(_check(write_split, [(40, 30)], boxes).to_json())
    assert content["ok"] is True
    assert content["splits"][0]["zero_size"] == list(range(10, 40))


def test_long_lists_of_errors_are_cut_in_the_text_alone(write_split):
    def empty(folder):
        for file in folder.iterdir():
            file.write_bytes(b"")

    report = _check(write_split, [(40, 30)] * 30, GOOD, prepare=empty)
    assert len(report.splits[0].errors) == 30
    assert report.text().count("ERROR: image id") == 10
    assert "ERROR: and 20 more (--json lists them all)" in report.text()


def test_digit_scenes_pass_and_progress_is_told(tmp_path):
    scenes = DigitScenesConfig(root=tmp_path, train_images=60, validation_images=20, test_images=20)
    told = []
    report = check_data(DataConfig(digit_scenes=scenes), lambda *call: told.append(call))
    assert report.ok and report.warnings == ()
    assert ("checking train images", 60, 60) in told
