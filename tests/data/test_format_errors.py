"""What is odd or wrong with YOLO and image folders is named with file and line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from coco_files import picture
from format_reading import problem, read

from d3etr.config.data import SplitConfig
from d3etr.data.splits import open_split, read_split
from d3etr.errors import UserError

Write = Callable[..., Path]


@pytest.fixture
def yolo(tmp_path: Path) -> Write:
    """One picture of 40 x 20 pixels with the given label lines, and a data.yaml."""

    def write(labels: str | None = "0 0.5 0.5 0.5 0.5\n", yaml: str = "", folder: str = "") -> Path:
        root = tmp_path / (folder or "yolo")
        (root / "images/train").mkdir(parents=True)
        (root / "labels/train").mkdir(parents=True)
        picture(40, 20).save(root / "images/train/a.png")
        if labels is not None:
            (root / "labels/train/a.txt").write_text(labels)
        default = "train: images/train\nval: images/train\nnames: [cat, dog]\n"
        (root / "data.yaml").write_text(yaml or default)
        return root / "data.yaml"

    return write


def test_yolo_boxes_are_centre_and_size_as_fractions(yolo: Write) -> None:
    [record] = read(yolo("1 0.5 0.25 0.5 0.5\n0 0.1 0.5 0.2 1\n\n")).records
    assert record.boxes_xywh.tolist() == [[10, 0, 20, 10], [0, 0, 8, 20]]
    assert record.labels.tolist() == [1, 0] and (record.id, record.file_name) == (1, "a.png")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("2 0.5 0.5 0.1 0.1", ["class 2", "2 names", "data.yaml", "0 to 1"]),
        ("-1 0.5 0.5 0.1 0.1", ["class -1"]),
        ("0.5 0.5 0.5 0.1 0.1", ["class 0.5", "whole number"]),
        ("nan 0.5 0.5 0.1 0.1", ["class nan"]),
        ("0 20 10 8 8", ["found 20", "from 0 to 1", "divide pixels"]),
        ("0 0.5 0.5 1.2 0.1", ["found 1.2"]),
        ("0 -0.5 0.5 0.2 0.1", ["found -0.5"]),
        ("0 0.5 nan 0.2 0.1", ["found nan"]),
        ("0 0.5 0.5 0.2", ["found 4 numbers", "class cx cy w h"]),
        ("0 0.5 0.5 0.2 0.1 0.9", ["found 6 numbers", "confidence"]),
        ("0 0.5 0.5 0.2 0.1 0.9 0.3 0.2", ["found 8 numbers", "outline"]),
        ("cat 0.5 0.5 0.2 0.1", ["'cat 0.5", "expected numbers"]),
    ],
)
def test_yolo_lines_that_cannot_be_used_are_named_with_file_and_line(
    yolo: Write, line: str, words: list[str]
) -> None:
    text = problem(yolo(f"0 0.5 0.5 0.1 0.1\n{line}\n"))
    for word in ["labels/train/a.txt:2: ", *words]:
        assert word in text


def test_all_problems_of_yolo_labels_come_at_once(yolo: Write) -> None:
    text = problem(yolo("7 0 0 0 0\n" * 20))
    assert "a.txt:1:" in text and "a.txt:8:" in text and "and 12 more" in text


def test_yolo_outlines_become_boxes_and_repeated_lines_one(
    yolo: Write, caplog: pytest.LogCaptureFixture
) -> None:
    place = yolo("0 0.25 0.5 0.75 0.5 0.5 0.75\n1 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1\n")
    with caplog.at_level(logging.WARNING):
        [record] = read(place).records
    assert record.boxes_xywh[0].tolist() == [10, 10, 20, 5] and len(record.labels) == 2
    assert "1 lines are outlines" in caplog.text and "a.txt:1" in caplog.text
    assert "1 lines repeat another" in caplog.text and "a.txt:3" in caplog.text


def test_yolo_keypoints_are_left_out(yolo: Write) -> None:
    yaml = "train: images/train\nval: images/train\nnames: [cat]\nkpt_shape: [1, 2]\n"
    [record] = read(yolo("0 0.5 0.5 0.5 0.5 0.1 0.1\n", yaml)).records
    assert record.boxes_xywh.tolist() == [[10, 5, 20, 10]]


def test_yolo_boxes_without_size_are_dropped_and_named_by_line(
    yolo: Write, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        [record] = read(yolo("0 0.5 0.5 0 0.5\n0 0.5 0.5 0.5 0.5\n")).records
    assert len(record.labels) == 1
    assert "1 boxes dropped" in caplog.text and "a.txt:1)" in caplog.text


def test_yolo_images_without_labels_are_kept_unless_all_are(
    yolo: Write, caplog: pytest.LogCaptureFixture
) -> None:
    place = yolo()
    picture(30, 30).save(place.parent / "images/train/b.png")
    picture(30, 30).save(place.parent / "images/train/c.png")
    (place.parent / "labels/train/c.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        assert [len(record.labels) for record in read(place).records] == [1, 0, 0]
    assert "1 images have no label file" in caplog.text and "labels/train/b.txt" in caplog.text
    (place.parent / "labels").rename(place.parent / "elsewhere")
    text = problem(place)
    assert "none of the 3 images has a label file" in text and "labels/train/a.txt" in text


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("train: images/train\nnames: [a]\ntrain: x\n", ["line 3", "given twice"]),
        ("- images\n", ["no mapping", "train, val and names"]),
        ("val: images/train\nnames: [a]\n", ["no 'train'", "found val"]),
        ("train: images/gone\nnames: [a]\n", ["'images/gone'", "not there", "looked for"]),
        ("train: 5\nnames: [a]\n", ["'train' is 5", "a list of paths"]),
        ("path: gone\ntrain: images/train\nnames: [a]\n", ["path 'gone'", "no folder"]),
        ("train: images/train\n", ["names is None", "class names"]),
        ("train: images/train\nnames: {0: a, 2: b}\n", ["ids 0, 2", "from 0 to 1"]),
        ("train: images/train\nnames: [a, a]\n", ["'a' more than once"]),
        ("train: images/train\nnames: [a]\nnc: 2\n", ["nc is 2", "1 classes"]),
        ("train: labels\nnames: [a]\n", ["'train' holds no images"]),
    ],
)
def test_a_data_yaml_that_cannot_be_used_is_named(yolo: Write, yaml: str, words: list[str]) -> None:
    text = problem(yolo(yaml=yaml))
    for word in ["data.yaml", *words]:
        assert word in text


@pytest.mark.parametrize(
    "yaml",
    [
        "path: .\ntrain: images/train\nnames: {0: cat, 1: dog}\nnc: 2\ndownload: https://x/y.zip\n",
        "train: ../images/train\nnames: ['cat', 'dog']\n",  # as Roboflow exports it
        "train: [images/train]\nnames:\n  0: cat\n  1: dog\n",
        "train: list.txt\nnames: [cat, dog]\n",
    ],
)
def test_the_ways_to_write_a_data_yaml_mean_the_same(yolo: Write, yaml: str) -> None:
    place = yolo(yaml=yaml)
    (place.parent / "list.txt").write_text("./images/train/a.png\n")
    for name in (place, place.parent):
        split = read(name)
        assert [category.name for category in split.categories] == ["cat", "dog"]
        assert [len(record.labels) for record in split.records] == [1]


def test_a_yolo_split_may_be_several_folders(yolo: Write) -> None:
    place = yolo(yaml="train: [images/train, images/more]\nnames: [cat, dog]\n")
    (place.parent / "images/more").mkdir()
    (place.parent / "labels/more").mkdir()
    picture(30, 30).save(place.parent / "images/more/a.png")
    (place.parent / "labels/more/a.txt").write_text("1 0.5 0.5 1 1\n")
    split = read(place)
    assert [record.file_name for record in split.records] == ["more/a.png", "train/a.png"]
    assert [record.labels.tolist() for record in split.records] == [[1], [0]]


def test_lines_of_a_yolo_list_that_name_no_picture_are_warned_of(
    yolo: Write, caplog: pytest.LogCaptureFixture
) -> None:
    place = yolo(yaml="train: list.txt\nnames: [cat, dog]\n")
    lines = "images/train/a.png\n\nimages/train/b.heic\nimages/train\n"
    (place.parent / "list.txt").write_text(lines)
    assert [record.file_name for record in read(place).records] == ["images/train/a.png"]
    where = f"({place.parent}/list.txt:3, {place.parent}/list.txt:4)"
    assert f"2 lines of lists name no picture of a kind that is read and are left out {where}" in (
        caplog.text
    )


def test_a_yolo_list_cannot_leave_the_data_set(yolo: Write, tmp_path: Path) -> None:
    place = yolo(yaml="train: list.txt\nnames: [cat, dog]\n")
    picture(9, 9).save(tmp_path / "secret.png")
    for line in ("../secret.png", str(tmp_path / "secret.png")):
        (place.parent / "list.txt").write_text(f"images/train/a.png\n{line}\n")
        assert "is outside of" in problem(place)
    (place.parent / "list.txt").write_text("images/train/gone.png\n")
    assert "is listed, but not there" in problem(place)


def test_links_out_of_a_yolo_folder_have_to_be_allowed(yolo: Write, tmp_path: Path) -> None:
    place = yolo()
    picture(9, 9).save(tmp_path / "b.png")
    (place.parent / "images/train/b.png").symlink_to(tmp_path / "b.png")
    with pytest.raises(UserError, match="links lead out of this folder"):
        read(place)
    split = SplitConfig(annotations=place, follow_links=True)
    assert len(read_split("train", split).records) == 2


def test_images_and_subset_of_yolo(yolo: Write, tmp_path: Path) -> None:
    place = yolo(yaml="train: images/train\nextra: images/train\nnames: [cat, dog]\n")
    with pytest.raises(UserError, match="'images' is set too"):
        read_split("train", SplitConfig(annotations=place, images=tmp_path))
    assert len(read(place, "validation", subset="extra").records) == 1
    assert "has no 'val'" in problem(place, "validation")


def test_a_damaged_picture_of_a_yolo_folder_is_named(yolo: Write) -> None:
    place = yolo()
    (place.parent / "images/train/b.jpg").write_bytes(b"no picture")
    assert "b.jpg: cannot be decoded" in problem(place)


@pytest.fixture
def hub(tmp_path: Path) -> Write:
    """One picture of 40 x 20 pixels and its line, for training."""

    def write(objects: object = None, line: str = "", **more: object) -> Path:
        root = tmp_path / "hub"
        (root / "train").mkdir(parents=True)
        picture(40, 20).save(root / "train/a.png")
        boxes = {"bbox": [[1, 2, 3, 4]], "categories": ["cat"]} if objects is None else objects
        entry = {"file_name": "a.png", "objects": boxes, **more}
        (root / "train/metadata.jsonl").write_text((line or json.dumps(entry)) + "\n")
        return root

    return write


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ([], ["objects is []", "bbox and categories"]),
        ({"bbox": [[1, 2, 3, 4]]}, ["lacks bbox or categories"]),
        ({"bbox": [[1, 2, 3, 4]], "categories": []}, ["1 boxes", "another length"]),
        ({"bbox": [[1, 2, 3]], "categories": ["a"]}, ["bbox is [1, 2, 3]", "[x, y, width"]),
        ({"bbox": [[1, 2, 3, None]], "categories": ["a"]}, ["bbox is"]),
        ({"bbox": [[1, 2, 3, 4]], "categories": [None]}, ["class None"]),
        ({"bbox": [[1, 2, 3, 4]], "categories": ["a"], "area": ["x"]}, ["area is 'x'"]),
        ({"bbox": [[1, 2, 3, 4]], "categories": ["a"], "iscrowd": ["0"]}, ["iscrowd is '0'"]),
    ],
)
def test_image_folder_lines_that_cannot_be_used_are_named(
    hub: Write, objects: object, words: list[str]
) -> None:
    text = problem(hub(objects))
    for word in ["train/metadata.jsonl:1: ", *words]:
        assert word in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["metadata.jsonl:1: broken JSON"]),
        ("[]", ["expected an object"]),
        ('{"file_name": "../a.png"}', ["leaves the image folder"]),
        ('{"file_name": 5}', ["file_name is 5"]),
        ('{"file_name": "a.png"}\n{"file_name": "a.png"}', ["jsonl:2: 'a.png' is also in"]),
        ('{"file_name": "gone.png"}', ["no object has a class"]),
    ],
)
def test_image_folder_entries_that_cannot_be_used_are_named(
    hub: Write, line: str, words: list[str]
) -> None:
    text = problem(hub(line=line))
    for word in words:
        assert word in text


def test_files_of_all_images_have_any_size_and_those_of_one_image_do_not(
    hub: Write, yolo: Write
) -> None:
    megabytes = 21 * 2**20
    assert len(read(hub(caption="x" * megabytes)).records) == 1
    place = yolo(yaml="train: list.txt\nnames: [cat, dog]\n")
    (place.parent / "list.txt").write_text(f"images/train/a.png{' ' * megabytes}\n")
    assert len(read(place).records) == 1
    (place.parent / "labels/train/a.txt").write_text("0 0.5 0.5 0.5 0.5" + " " * megabytes)
    with pytest.raises(UserError, match=r"a\.txt has more than 20 MiB"):
        read(place)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_separators_within_a_text_end_no_line(hub: Write, yolo: Write, separator: str) -> None:
    name = f"a{separator}b"
    boxes = {"bbox": [[1, 2, 3, 4]], "categories": [name]}
    entry = {"file_name": "a.png", "text": name, "objects": boxes}
    root = hub(line=json.dumps(entry, ensure_ascii=False))
    (root / "classes.txt").write_text(f"dog\r\n{name}\rcat\n", newline="")
    assert [category.name for category in read(root).categories] == ["dog", name, "cat"]
    place = yolo(yaml="train: list.txt\nnames: [cat, dog]\n")
    picture(40, 20).save(place.parent / f"images/train/{name}.png")
    (place.parent / "list.txt").write_text(f"images/train/{name}.png\nimages/train/a.png\n")
    assert [record.file_name for record in read(place).records] == [
        "images/train/a.png",
        f"images/train/{name}.png",
    ]


def test_image_folder_numbers_are_lines_of_classes_txt(hub: Write) -> None:
    root = hub({"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "category": [1, 0], "iscrowd": [0, 1]})
    assert [category.name for category in read(root).categories] == ["0", "1"]
    (root / "classes.txt").write_text("dog\ncat\n")
    split = read(root)
    assert [category.name for category in split.categories] == ["dog", "cat"]
    assert split.records[0].labels.tolist() == [1, 0]
    assert split.records[0].crowd.tolist() == [False, True]
    (root / "classes.txt").write_text("dog\n")
    assert "class 1 is unknown" in problem(root)


def test_an_image_folder_without_the_split_says_where_it_looked(hub: Write) -> None:
    text = problem(hub(), "validation")
    assert "val/metadata.jsonl or validation/metadata.jsonl" in text


def test_a_photograph_that_lies_on_its_side_is_upright_in_every_format(
    yolo: Write, tmp_path: Path
) -> None:
    from PIL import ExifTags

    from d3etr.config.data import PreprocessingConfig
    from d3etr.data.dataset import DetectionDataset

    place = yolo("0 0.5 0.25 1 0.5\n")
    exif = picture(40, 20).getexif()
    exif[ExifTags.Base.Orientation] = 6
    (place.parent / "images/train/a.png").unlink()
    picture(40, 20).save(place.parent / "images/train/a.jpg", exif=exif)
    split = read(place)
    [record] = split.records
    assert (record.width, record.height) == (20, 40)
    assert record.boxes_xywh.tolist() == [[0, 0, 20, 20]]
    assert DetectionDataset(split, PreprocessingConfig()).decoded(0).shape == (3, 40, 20)


def test_open_split_says_which_split_a_data_set_lacks(yolo: Write) -> None:
    from d3etr.config.data import DataConfig

    data = DataConfig(dataset=yolo(yaml="train: images/train\nnames: [cat, dog]\n"))
    assert np.sum([len(record.labels) for record in open_split(data, "train").records]) == 1
    with pytest.raises(UserError, match=r"data\.validation\.annotations: .*has no 'val'"):
        open_split(data, "validation")
