"""Photometric distortion, zoom-out, IoU crop, mosaic: boxes follow pixels, draws repeat."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import annotation
from PIL import Image

from d3etr.config.data import STRONG, AugmentationConfig, DataConfig, PreprocessingConfig
from d3etr.data.augmentation import Shown, draw_augmentation, sample_generator
from d3etr.data.dataset import DetectionDataset, MixedDataset
from d3etr.data.loading import EpochLoader
from d3etr.data.preprocessing import output_size
from d3etr.data.records import without_objects
from d3etr.data.splits import read_split
from d3etr.data.strong import Photometric, Strong, change_pixels, draw_strong
from d3etr.data.teacher_boxes import read_teacher_boxes

EXACT = PreprocessingConfig(exact_size=(96, 96), normalisation="unit")
BY_SIDE = PreprocessingConfig(shortest_side=64, longest_side=120)
COLOURS = {0: (250, 10, 10), 3: (10, 250, 10), 7: (10, 10, 250)}
"""Of categories, in the order of their labels: label k has channel k."""
EVERYTHING = {"photometric": 0.5, "zoom_out": 0.5, "iou_crop": 0.8, "mosaic": 0.5}


@pytest.fixture
def painted(write_split):
    """Grey pictures with one rectangle of each class, in its colour."""
    generator, boxes, sizes = np.random.default_rng(0), [], []
    pictures = []
    for image in range(1, 9):
        width, height = (int(side) for side in generator.integers(90, 160, 2))
        pixels = np.full((height, width, 3), 90, dtype=np.uint8)
        for place, (category, colour) in enumerate(COLOURS.items()):
            # One below the other: none hides another.
            top, left = place * height // 3 + 3, int(generator.integers(0, width - 45))
            box = [left, top, int(generator.integers(20, 45)), height // 3 - 6]
            pixels[top : top + box[3], left : left + box[2]] = colour
            boxes.append(annotation(len(boxes) + 1, image, category, box))
        sizes.append((width, height))
        pictures.append(pixels)
    config = write_split(sizes, boxes)
    for number, pixels in enumerate(pictures, start=1):
        Image.fromarray(pixels).save(Path(str(config.images)) / f"{number}.png")
    return config


@pytest.fixture
def split(painted):
    split = read_split("train", painted)
    assert [category.id for category in split.categories] == [*COLOURS]
    return split


def _dataset(split, preprocessing=EXACT, seed=1, **augmentation):
    config = AugmentationConfig(**augmentation)
    return DetectionDataset(split, preprocessing, config, seed=seed)


def _colour_boxes(pixels, label):
    """[4] xyxy of all pixels of a class's colour, or None."""
    others = [k for k in range(3) if k != label]
    found = (pixels[label] > 150) & (pixels[others] < 70).all(0)
    if not found.any():
        return None
    rows, columns = torch.nonzero(found.any(1)), torch.nonzero(found.any(0))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def _corners(sample):
    height, width = sample.pixels.shape[1:]
    centre, size = sample.boxes_cxcywh[:, :2], sample.boxes_cxcywh[:, 2:]
    boxes = np.concatenate([centre - size / 2, centre + size / 2], 1)
    return boxes * np.array([width, height] * 2)


@pytest.mark.parametrize("preprocessing", [EXACT, BY_SIDE], ids=["exact", "by side"])
@pytest.mark.parametrize("kind", ["zoom_out", "iou_crop", "both"])
def test_boxes_follow_the_pixels(split, preprocessing, kind):
    both = {"zoom_out": 1.0, "iou_crop": 1.0}
    dataset = _dataset(split, preprocessing, **(both if kind == "both" else {kind: 1.0}))
    compared = 0
    for epoch in range(12):
        for index in range(len(dataset)):
            sample = dataset.sample(index, epoch)
            assert sample.pixels.shape[1:] == dataset.plan(index, epoch).size
            for label, box in zip(sample.labels, _corners(sample), strict=True):
                if (box[2:] - box[:2]).min() < 6:
                    continue  # its colour is mixed with what is around it
                np.testing.assert_allclose(_colour_boxes(sample.pixels, label), box, atol=2.1)
                compared += 1
    assert compared > 100


def test_boxes_of_a_mosaic_are_those_of_its_four_images(split):
    dataset = _dataset(split, mosaic=1.0, horizontal_flip=0.5, vertical_flip=0.3)
    for epoch in range(6):
        for index in range(len(dataset)):
            sample, plan = dataset.sample(index, epoch), dataset.plan(index, epoch)
            assert index in plan.strong.mosaic.images
            assert sample.pixels.shape == (3, 96, 96) and len(sample.labels) <= 12
            for label, box in zip(sample.labels, _corners(sample), strict=True):
                left, top, right, bottom = (np.round(box) + np.array([1, 1, -1, -1])).astype(int)
                if min(right - left, bottom - top) < 3:
                    continue
                inside = sample.pixels[:, top:bottom, left:right].float().mean((1, 2))
                assert inside.argmax() == label and inside[label] > 180
            # And nothing of a colour is outside of all boxes of its class.
            for label in range(3):
                others = [k for k in range(3) if k != label]
                found = (sample.pixels[label] > 200) & (sample.pixels[others] < 50).all(0)
                for box in _corners(sample)[sample.labels == label]:
                    left, top, right, bottom = np.round(box).astype(int)
                    found[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = False
                assert found.sum() <= 4


@pytest.mark.parametrize("preprocessing", [EXACT, BY_SIDE], ids=["exact", "by side"])
def test_planned_sizes_are_those_of_the_samples(split, preprocessing):
    dataset = _dataset(split, preprocessing, **EVERYTHING, crop=0.3)
    dataset.show_teacher(1.5)
    for epoch in range(4):
        for index, sizes in enumerate(dataset.sizes(epoch).tolist()):
            sample = dataset.sample(index, epoch)
            assert [*sample.pixels.shape[1:], *sample.teacher_pixels.shape[1:]] == sizes


def test_the_teacher_sees_the_same_picture_larger(split):
    dataset = _dataset(split, **EVERYTHING)
    dataset.show_teacher(2.0)
    for index in range(len(dataset)):
        sample = dataset.sample(index, 0)
        smaller = torch.nn.functional.avg_pool2d(sample.teacher_pixels.float(), 2)
        assert (smaller - sample.pixels.float()).abs().mean() < 6


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_a_mosaic_of_images_of_any_size_has_its_images(split, scale):
    unresized = PreprocessingConfig(shortest_side=None, longest_side=None)
    dataset = _dataset(split, unresized, mosaic=1.0)
    dataset.show_teacher(scale)
    plan, record = dataset.plan(2, 0), split.records[2]
    assert plan.size == (record.height, record.width)
    assert plan.teacher_size == output_size(record.width, record.height, unresized, scale=scale)


def test_boxes_in_files_move_as_objects_do(split, tmp_path):
    ids = [*COLOURS]
    entries = [
        {"image_id": r.id, "category_id": ids[label], "bbox": box.tolist(), "score": 0.5}
        for r in split.records
        for label, box in zip(r.labels.tolist(), r.boxes_xywh, strict=True)
    ]
    file = tmp_path / "found.json"
    file.write_text(json.dumps(entries))
    dataset = _dataset(split, **EVERYTHING)
    dataset.teacher_boxes = read_teacher_boxes([file], split, 0.0)
    for index in range(len(dataset)):
        for epoch in range(5):
            sample = dataset.sample(index, epoch)
            np.testing.assert_array_equal(sample.of_teacher.boxes_cxcywh, sample.boxes_cxcywh)
            np.testing.assert_array_equal(sample.of_teacher.labels, sample.labels)


def test_iou_crops_keep_exactly_the_objects_whose_centre_is_in_them(split):
    dataset, cropped = _dataset(split, iou_crop=1.0), 0
    for index, record in enumerate(split.records):
        for epoch in range(30):
            window, (labels, boxes) = dataset.plan(index, epoch).strong.window, record.objects()
            if window is None:
                continue
            cropped += 1
            top, left, height, width = window
            assert 0.29 < height / record.height <= 1 and 0.29 < width / record.width <= 1
            assert 0.5 <= width / height <= 2
            x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).T
            inside = (left < x) & (x < left + width) & (top < y) & (y < top + height)
            assert inside.any()
            assert dataset.sample(index, epoch).labels.tolist() == labels[inside].tolist()
    assert cropped > 150  # of 240; one in seven leaves the image as it is


def test_images_without_objects_are_not_iou_cropped(write_split):
    split = read_split("train", write_split([(60, 40)]))
    for epoch in range(20):
        assert _dataset(split, iou_crop=1.0).plan(0, epoch).strong == Strong()


def test_small_objects_vanish_where_the_canvas_grows(write_split):
    split = read_split("train", write_split([(96, 96)], [annotation(1, 1, 7, [10, 10, 2, 2])]))
    dataset, counts = _dataset(split, zoom_out=1.0), []
    for epoch in range(40):
        factor = dataset.plan(0, epoch).strong.canvas[0] / 96
        counts.append(len(dataset.sample(0, epoch).labels))
        assert counts[-1] == (factor <= 2)
    assert 0 < sum(counts) < 40


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["zoom_out", "iou_crop", "mosaic"])
def test_they_happen_as_often_as_configured(split, kind, share):
    dataset = _dataset(split, **{kind: share})
    names = {"zoom_out": "canvas", "iou_crop": "window", "mosaic": "mosaic"}
    found = [
        getattr(dataset.plan(index, epoch).strong, names[kind]) is not None
        for index in range(8)
        for epoch in range(100)
    ]
    # An IoU crop of one in seven draws leaves the image as it is, or more where trials fail.
    expected = share * (0.8 if kind == "iou_crop" else 1)
    assert np.mean(found) == pytest.approx(expected, abs=0.08)


def test_each_photometric_change_has_the_probability():
    config = AugmentationConfig(photometric=0.5)
    plans = [draw_strong(config, None, sample_generator(0, 0, k)).photometric for k in range(1000)]
    for key in ("brightness", "contrast", "saturation", "hue", "channels"):
        drawn = [getattr(plan, key) for plan in plans if getattr(plan, key) is not None]
        assert len(drawn) == pytest.approx(500, abs=60), key
    ranges = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5}
    for key, reach in ranges.items():
        drawn = [getattr(plan, key) for plan in plans if getattr(plan, key) is not None]
        assert 1 - reach <= min(drawn) < max(drawn) <= 1 + reach
        assert max(drawn) - min(drawn) > 1.8 * reach


def test_colours_change_and_the_input_stays():
    pixels = torch.full((3, 6, 6), 100, dtype=torch.uint8)
    pixels[0] = 50
    before = pixels.clone()
    brighter = change_pixels(pixels, Strong(photometric=Photometric(brightness=1.1)))
    assert brighter[0, 0, 0] == 55 and brighter[1, 0, 0] == 110
    turned = change_pixels(pixels, Strong(photometric=Photometric(channels=(2, 1, 0))))
    assert turned[2, 0, 0] == 50
    assert torch.equal(pixels, before)


def test_switching_one_on_leaves_the_others_draws(split):
    one, both = _dataset(split, iou_crop=0.5), _dataset(split, iou_crop=0.5, photometric=0.5)
    flips = _dataset(split)
    for epoch in range(20):
        first, second = one.plan(3, epoch), both.plan(3, epoch)
        assert first.strong.window == second.strong.window
        assert first.horizontal_flip == flips.plan(3, epoch).horizontal_flip


def test_without_them_nothing_is_as_it_was_not(split):
    """Plans and pixels of a recipe without strong augmentation, by what was drawn before them."""
    dataset = _dataset(split, BY_SIDE, crop=0.5, colour_jitter=0.2, shortest_sides=(48, 64))
    for index in range(len(dataset)):
        plan, record = dataset.plan(index, 4), split.records[index]
        chance = sample_generator(1, 4, index)
        drawn = [chance.random() for _ in range(15)]
        assert plan.strong == Strong()
        assert plan.horizontal_flip == (drawn[6] < 0.5)
        assert (plan.crop is not None) == (drawn[0] < 0.5)
        again = draw_augmentation(
            record.width,
            record.height,
            dataset.augmentation,
            BY_SIDE,
            sample_generator(1, 4, index),
        )
        assert plan == again


def _loader(config, workers=0, preprocessing=EXACT, world=1, rank=0, seed=2, **augmentation):
    data = DataConfig(
        train=config,
        validation=config,
        preprocessing=preprocessing,
        augmentation=AugmentationConfig(**augmentation),
        workers=workers,
    )
    cut = {"parts": 2, "rank": rank, "world_size": world}
    return EpochLoader(read_split("train", config), data, batch_size=4, seed=seed, **cut)


def _batches(loader, epoch, start=0):
    try:
        return [batch for step in loader.epoch(epoch, start) for batch in step]
    finally:
        loader.close()


def _assert_same(first, second):
    for (images, targets), (others, theirs) in zip(first, second, strict=True):
        assert torch.equal(images.pixels, others.pixels)
        assert torch.equal(targets.boxes_cxcywh, theirs.boxes_cxcywh)
        assert targets.counts == theirs.counts


def test_images_are_equal_whatever_loads_them(painted):
    everything = {**EVERYTHING, "shortest_sides": (64, 96)}
    expected = _batches(_loader(painted, **everything), 1)
    _assert_same(expected, _batches(_loader(painted, workers=2, **everything), 1))
    _assert_same(expected[2:], _batches(_loader(painted, **everything), 1, start=1))
    halves = [_batches(_loader(painted, world=2, rank=rank, **everything), 1) for rank in (0, 1)]
    _assert_same(expected[0::2], halves[0])
    _assert_same(expected[1::2], halves[1])
    other = _batches(_loader(painted, seed=3, **everything), 1)
    assert not all(
        a[0].pixels.shape == b[0].pixels.shape and torch.equal(a[0].pixels, b[0].pixels)
        for a, b in zip(expected, other, strict=True)
    )


@pytest.mark.parametrize("preprocessing", [EXACT, BY_SIDE], ids=["exact", "by side"])
def test_the_last_steps_are_without(painted, preprocessing):
    loader = _loader(painted, preprocessing=preprocessing, zoom_out=1.0, iou_crop=0.5)
    loader.end_strong(3)  # of two steps an epoch: within the second
    keys = [key for epoch in range(3) for key in loader._keys(epoch)]
    assert [key.shown.strong for key in keys] == [True] * 6 + [False] * 6
    for epoch in range(3):
        batches = [batch for step in loader.epoch(epoch) for batch in step]
        for place, (images, _) in enumerate(batches):
            key = keys[4 * epoch + place]
            assert images.pixels.shape[2:] == key.size
            plain = [
                loader.dataset.sample(index, epoch, shown=Shown(strong=False))
                for index in key.indices
            ]
            same = all(
                torch.equal(
                    image[:, : one.pixels.shape[1], : one.pixels.shape[2]], one.pixels / 255
                )
                for image, one in zip(images.pixels, plain, strict=True)
                if preprocessing is EXACT
            )
            assert preprocessing is BY_SIDE or same == (not key.shown.strong)


def test_images_without_labels_make_mosaics_of_their_own(painted, split):
    others = dataclasses.replace(
        split, name="unlabelled", records=tuple(without_objects(r) for r in split.records[:5])
    )
    both = dataclasses.replace(split, unlabelled=others)
    dataset = MixedDataset(both, EXACT, AugmentationConfig(mosaic=1.0), seed=1)
    sample = dataset.sample(len(dataset) + 2, 0)
    assert not sample.labelled and len(sample.labels) == 0
    assert sample.pixels.shape == (3, 96, 96)
    assert len(dataset.sizes(0)) == len(dataset) + 5


def test_every_strong_key_is_off_by_default():
    assert not AugmentationConfig().strong
    assert all(getattr(AugmentationConfig(), key) == 0 for key in STRONG)
    with pytest.raises(ValueError, match="off_for_last_epochs has no effect"):
        AugmentationConfig(off_for_last_epochs=2)
