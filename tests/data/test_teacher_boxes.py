"""Boxes of a teacher in files: read, mapped to classes, augmented as objects are, batched."""

import json

import numpy as np
import pytest
import torch
from coco_files import annotation

from d3etr.config.data import AugmentationConfig, PreprocessingConfig
from d3etr.data.dataset import DetectionDataset
from d3etr.data.splits import read_split
from d3etr.data.teacher_boxes import read_teacher_boxes
from d3etr.data.transforms import collate
from d3etr.errors import UserError

RESIZED = PreprocessingConfig(shortest_side=24, longest_side=64)


@pytest.fixture
def split(write_split):
    boxes = [annotation(1, 1, 7, [5, 5, 20, 10]), annotation(2, 2, 3, [2, 8, 12, 30])]
    return read_split("train", write_split([(40, 30), (30, 50), (20, 20)], boxes))


def _entry(image=1, category=7, box=(5, 5, 20, 10), score=0.9, **others):
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [*box],
        "score": score,
    } | others


@pytest.fixture
def write(tmp_path):
    def write(*entries, name="results.json"):
        path = tmp_path / name
        path.write_text(json.dumps(entries))
        return path

    return write


def test_boxes_come_by_image_and_class_from_all_files(split, write):
    ids = [category.id for category in split.categories]
    first = write(_entry(), _entry(score=0.2), _entry(image=2, category=ids[0], score=0.5))
    name = split.categories[1].name
    second = write(
        _entry(image=2, category=12345, category_name=name, box=(-5, 10, 50, 10)),
        _entry(image=2, box=(100, 100, 5, 5)),
        _entry(image=99),
        name="other.json",
    )
    one, two, three = read_teacher_boxes([first, second], split, 0.3)
    assert one.labels.tolist() == [ids.index(7)] and one.scores.tolist() == [np.float32(0.9)]
    assert one.boxes_xyxy.tolist() == [[5, 5, 25, 15]]
    assert two.labels.tolist() == [0, 1]  # clipped; what is outside of the image is dropped
    assert two.boxes_xyxy[1].tolist() == [0, 10, 30, 20]
    assert three.labels.shape == (0,) and three.boxes_xyxy.shape == (0, 4)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([_entry(category=5)], r"results\.json: classes that .*id 5 .*7: "),
        ([_entry(category_name="zebra")], r"'zebra'"),
        ([_entry(image=77)], r"none of its 1 boxes is in an image of .*image id there: 1"),
        ([_entry(score=1.5)], r"\[0\]: score is 1\.5; expected a probability"),
        ([_entry(box=(1, 2, 3))], r"\[0\]: bbox is \[1, 2, 3\]"),
        ([{"image_id": 1}], r"\[0\]: missing key bbox, score, category_id"),
        ([_entry(), 3], r"\[1\]: expected an object, found 3"),
        ([_entry(image="1")], r"\[0\]: image_id is '1'"),
        ([_entry(category=[7])], r"\[0\]: category_id or category_name"),
    ],
)
def test_what_cannot_be_used_is_named(split, write, entries, text):
    with pytest.raises(UserError, match=text):
        read_teacher_boxes([write(*entries)], split, 0.3)


@pytest.mark.parametrize("content", ["{}", "[{", "3"])
def test_a_file_that_is_no_list_is_named(split, tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"teacher\.detections .*results\.json.*COCO results file"):
        read_teacher_boxes([path], split, 0.3)


def test_ground_truth_as_a_teachers_boxes_moves_as_ground_truth_does(split, write):
    entries = [_entry(), _entry(image=2, category=3, box=(2, 8, 12, 30), score=0.4)]
    augmentation = AugmentationConfig(crop=0.7, vertical_flip=0.5, shortest_sides=(20, 28))
    dataset = DetectionDataset(split, RESIZED, augmentation, seed=1)
    plain = [dataset.sample(index, epoch) for epoch in range(6) for index in range(3)]
    dataset.teacher_boxes = read_teacher_boxes([write(*entries)], split, 0.3)
    samples = [dataset.sample(index, epoch) for epoch in range(6) for index in range(3)]
    for before, sample in zip(plain, samples, strict=True):
        assert before.of_teacher is None and torch.equal(before.pixels, sample.pixels)
        assert np.array_equal(before.boxes_cxcywh, sample.boxes_cxcywh)
        assert np.array_equal(sample.of_teacher.boxes_cxcywh, sample.boxes_cxcywh)
        assert np.array_equal(sample.of_teacher.labels, sample.labels)
    _, targets = collate(samples[:3], RESIZED)
    found = targets.of_teacher
    assert found is not None and found.of_teacher is None and targets.scores is None
    assert torch.equal(found.boxes_cxcywh, targets.boxes_cxcywh)
    assert torch.equal(found.labels, targets.labels) and found.counts == targets.counts
    assert found.scores.shape == found.labels.shape
    kept = found.scores[found.scores > 0].tolist()
    assert kept == [np.float32(s) for s, n in ((0.9, 0), (0.4, 1)) if found.counts[n]]
    assert (found.scores > 0).sum(1).tolist() == [*found.counts]
