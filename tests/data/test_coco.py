import json
import logging

import numpy as np
import pytest
from coco_files import annotation
from hypothesis import given
from hypothesis import strategies as st

from d3etr.config.data import SplitConfig
from d3etr.data.annotations import Category, file_name_problem
from d3etr.data.judgement import judge_categories
from d3etr.data.splits import read_split
from d3etr.errors import UserError


def test_labels_are_contiguous_by_rising_category_id_whatever_the_files_order(write_split):
    split = read_split(
        "train",
        write_split(
            [(40, 30)], [annotation(1, 1, 7, [0, 0, 5, 5]), annotation(2, 1, 0, [1, 1, 5, 5])]
        ),
    )
    assert split.categories == (Category(0, "cat"), Category(3, "dog"), Category(7, "cup"))
    assert split.records[0].labels.tolist() == [2, 0]


def test_boxes_over_the_edge_are_clipped_for_training_and_kept_for_evaluation(write_split):
    split = read_split("train", write_split([(40, 30)], [annotation(5, 1, 0, [-4, 10, 20, 40])]))
    record = split.records[0]
    assert record.boxes_xyxy.tolist() == [[-4, 10, 16, 50]]
    assert record.objects()[1].tolist() == [[0, 10, 16, 30]]
    assert split.cleaning["clipped"] == (5,)


def test_crowds_are_no_training_targets_but_stay_for_evaluation(write_split):
    split = read_split(
        "train",
        write_split(
            [(40, 30)],
            [annotation(1, 1, 0, [0, 0, 9, 9], iscrowd=1), annotation(2, 1, 3, [1, 2, 5, 5])],
        ),
    )
    record = split.records[0]
    assert record.crowd.tolist() == [True, False]
    assert record.objects()[0].tolist() == [1]
    assert split.cleaning["crowd"] == (1,)


def test_boxes_without_area_are_dropped_and_named_in_the_log(write_split, caplog):
    boxes = [[1, 1, 0, 5], [1, 1, 5, 0], [3, 3, -2, 4], [50, 2, 5, 5], [2, 2, 6, 6]]
    config = write_split([(40, 30)], [annotation(n, 1, 0, box) for n, box in enumerate(boxes, 11)])
    with caplog.at_level(logging.WARNING):
        split = read_split("train", config)
    assert split.cleaning["zero_size"] == (11, 12, 13)
    assert split.cleaning["outside"] == (14,)
    assert split.records[0].boxes_xyxy.tolist() == [[2, 2, 8, 8]]
    assert "11, 12, 13" in caplog.text and "14" in caplog.text


def test_images_without_objects_are_kept(write_split):
    split = read_split(
        "train", write_split([(40, 30), (20, 20)], [annotation(1, 2, 0, [1, 1, 3, 3])])
    )
    assert [len(record.labels) for record in split.records] == [0, 1]


def test_area_is_the_files_own_where_it_has_one(write_split):
    split = read_split(
        "train",
        write_split(
            [(40, 30)],
            [annotation(1, 1, 0, [0, 0, 4, 5], area=7.5), annotation(2, 1, 0, [0, 0, 4, 5])],
        ),
    )
    assert split.records[0].areas.tolist() == [7.5, 20]


@pytest.mark.parametrize("area", [-5, 0, 200, 1e30, float("nan"), float("inf"), 10**400])
def test_an_area_that_cannot_be_the_boxs_is_replaced_and_named(write_split, caplog, area):
    boxes = [annotation(3, 1, 0, [0, 0, 4, 5], area=area), annotation(4, 1, 0, [9, 9, 4, 5])]
    with caplog.at_level(logging.WARNING):
        split = read_split("train", write_split([(40, 30)], boxes))
    assert split.records[0].areas.tolist() == [20, 20]
    assert split.cleaning["implausible_area"] == (3,)
    assert "1 boxes with an 'area'" in caplog.text and "annotation ids 3" in caplog.text


@pytest.mark.parametrize("area", [0.1, 19, 20, 30, None])
def test_areas_of_outlines_and_rounded_ones_are_kept_without_a_word(write_split, caplog, area):
    split = read_split(
        "train", write_split([(40, 30)], [annotation(1, 1, 0, [0, 0, 4, 5], area=area)])
    )
    assert split.records[0].areas.tolist() == [20 if area is None else area]
    assert split.cleaning["implausible_area"] == () and caplog.text == ""


def test_flags_of_other_formats_have_no_effect_and_are_named(write_split, caplog):
    flags = [
        {"ignore": 1},
        {"difficult": "1"},
        {"is_crowd": True},
        {"ignore": 0},
        {"iscrowd": None},
    ]
    boxes = [annotation(n, 1, 0, [0, 0, 9, 9], **flag) for n, flag in enumerate(flags)]
    with caplog.at_level(logging.WARNING):
        split = read_split("train", write_split([(40, 30)], boxes))
    assert not split.records[0].crowd.any()
    assert split.cleaning["foreign_flag"] == (0, 1, 2) and "they count as objects" in caplog.text


def test_records_follow_their_images_when_annotations_are_mixed(write_split):
    annotations = [annotation(n, image, 0, [n, 1, 3, 3]) for n, image in enumerate((2, 1, 2, 1))]
    split = read_split("train", write_split([(40, 30), (40, 30)], annotations))
    assert [record.boxes_xyxy[:, 0].tolist() for record in split.records] == [[1, 3], [0, 2]]


def _set(path, value):
    def change(content):
        *parents, last = path
        for key in parents:
            content = content[key]
        content[last] = value

    return change


def _remove(path):
    def change(content):
        *parents, last = path
        for key in parents:
            content = content[key]
        del content[last]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_remove(["annotations"]), ["missing key annotations", "'images'"]),
        (_remove(["images", 1, "width"]), ["images[1]", "missing key width"]),
        (_set(["images"], {}), ["'images' is a dict"]),
        (_set(["images"], []), ["'images' is empty"]),
        (_set(["categories"], []), ["'categories' is empty"]),
        (_set(["images", 1, "id"], 1), ["image id 1 is used twice", "1.png", "2.png"]),
        (_set(["images", 1, "id"], "a"), ["images[1]", "'a'", "integer"]),
        (_set(["images", 1, "id"], 2**63), ["images[1]", "63 bits"]),
        (_set(["images", 1, "id"], 2.0**60), ["images[1]", "lost digits"]),
        (_set(["images", 1, "height"], 0), ["images[1] (id 2)", "height is 0"]),
        (_set(["images", 0, "file_name"], "../x.png"), ["(id 1)", "../x.png", "leaves"]),
        (_set(["images", 0, "file_name"], "/etc/passwd"), ["/etc/passwd", "leaves"]),
        (_set(["annotations", 0, "image_id"], 99), ["annotations[0] (id 1)", "image_id 99"]),
        (_set(["annotations", 0, "category_id"], 5), ["category_id 5", "0, 3, 7"]),
        (
            _set(["annotations", 0, "bbox"], [1, 2, 3]),
            ["bbox is [1, 2, 3]", "[x, y, width, height]"],
        ),
        (_set(["annotations", 0, "bbox"], [1, 2, float("nan"), 3]), ["bbox is [1, 2, nan, 3]"]),
        (_set(["annotations", 0, "bbox"], [1, 2, True, 3]), ["bbox is"]),
        (_set(["annotations", 0, "iscrowd"], 3), ["iscrowd is 3"]),
        (_set(["annotations", 0], 3), ["annotations[0]", "expected an object"]),
        (_remove(["annotations", 0, "bbox"]), ["annotations[0] (id 1)", "missing key bbox"]),
        (_set(["categories", 1, "id"], 7), ["category id 7 is used twice"]),
        (_set(["categories", 1, "name"], "cup"), ["'cup'", "rename"]),
    ],
)
def test_what_is_wrong_is_named_with_its_place(write_split, change, words):
    config = write_split([(40, 30), (20, 20)], [annotation(1, 1, 0, [1, 1, 3, 3])], change=change)
    with pytest.raises(UserError) as caught:
        read_split("train", config)
    for word in [*words, str(config.annotations)]:
        assert word in str(caught.value)


def test_all_problems_of_a_file_come_at_once(write_split):
    config = write_split([(40, 30)], [annotation(n, 9, 9, [0]) for n in range(20)])
    with pytest.raises(UserError, match=r"(?s)annotations\[0\].*annotations\[7\].*and 12 more"):
        read_split("train", config)


def test_broken_json_names_file_and_place(tmp_path):
    file = tmp_path / "cut.json"
    file.write_text('{"images": [')
    with pytest.raises(UserError, match=r"cut\.json: broken JSON .*line 1 column"):
        read_split("train", SplitConfig(images=tmp_path, annotations=file))


def test_a_missing_annotation_file_and_a_missing_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json cannot be read"):
        read_split("train", SplitConfig(images=tmp_path, annotations=tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"data\.train\.images: .*nowhere is not a folder"):
        read_split("train", SplitConfig(images=tmp_path / "nowhere", annotations=tmp_path / "x"))


def test_missing_images_are_named_with_their_ids(write_split):
    config = write_split([(40, 30)] * 3)
    (config.images / "2.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images .* 2\.png \(image id 2\)"):
        read_split("train", config)


def test_the_digest_depends_on_annotations_names_and_image_files_alone(write_split, tmp_path):
    config = write_split([(40, 30)], [annotation(1, 1, 0, [1, 1, 3, 3])])
    first = read_split("train", config).digest
    assert read_split("other name", config).digest == first
    moved = tmp_path / "moved"
    config.images.rename(moved)
    elsewhere = SplitConfig(images=moved, annotations=config.annotations)
    assert read_split("train", elsewhere).digest == first
    with (moved / "1.png").open("ab") as file:
        file.write(b"x")
    assert read_split("train", elsewhere).digest != first


def test_splits_with_other_categories_are_refused(write_split):
    first = read_split("train", write_split([(9, 9)]))
    same = read_split("validation", write_split([(9, 9)], name="validation"))
    assert judge_categories({"train": first, "validation": same}).errors == ()
    categories = [{"id": 0, "name": "cat"}, {"id": 3, "name": "doge"}, {"id": 7, "name": "cup"}]
    other = read_split("test", write_split([(9, 9)], name="test", categories=categories))
    (error,) = judge_categories({"train": first, "test": other}).errors
    assert "only in train: dog (id 3); only in test: doge (id 3)" in error


def test_a_byte_order_mark_and_whole_floats_are_read(write_split):
    config = write_split([(40, 30)], [annotation(1, 1.0, 0, [1, 1, 3, 3])])
    text = json.dumps(json.loads(config.annotations.read_text()))
    config.annotations.write_text("\ufeff" + text, encoding="utf-8")
    assert read_split("train", config).records[0].labels.tolist() == [0]


def test_large_ids_keep_every_digit(write_split):
    number = 2**60 + 1
    change = _set(["annotations", 0, "id"], number)
    config = write_split([(40, 30)], [annotation(1, 1, 0, [1, 1, 0, 3])], change=change)
    assert read_split("train", config).cleaning["zero_size"] == (number,)


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b.png", "\\", "/", "C:"]), min_size=1))
def test_accepted_file_names_stay_below_the_image_folder(parts):
    name = "/".join(parts)
    if file_name_problem(name) is None:
        resolved = np.array(name.replace("\\", "/").split("/"))
        assert ".." not in resolved and not name.startswith(("/", "\\", "C:"))
