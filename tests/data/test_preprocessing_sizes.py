"""Images of one exact size, and pixels that are divided by 255 alone."""

import pytest
import torch
from coco_files import annotation, picture
from pydantic import ValidationError

from d3etr.config.data import AugmentationConfig, DataConfig, PreprocessingConfig
from d3etr.config.load import plain_tree
from d3etr.data.dataset import DetectionDataset
from d3etr.data.images import to_pixels
from d3etr.data.judgement import _too_small
from d3etr.data.loading import EpochLoader, EvaluationBatches
from d3etr.data.preprocessing import output_size
from d3etr.data.splits import read_split
from d3etr.data.transforms import normalise, resized
from d3etr.errors import UserError

EXACT = PreprocessingConfig(exact_size=(48, 32), normalisation="unit")
SIZES = [(40, 30), (30, 50), (64, 20), (33, 33)] * 2


@pytest.fixture
def config(write_split):
    boxes = [annotation(n, n, 7, [2, 3, 20, 10]) for n in range(1, 9)]
    return write_split(SIZES, boxes)


def _loader(config, workers=0, **augmentation):
    data = DataConfig(
        train=config,
        validation=config,
        preprocessing=EXACT,
        augmentation=AugmentationConfig(**augmentation),
        workers=workers,
    )
    cut = {"parts": 2, "rank": 0, "world_size": 1}
    return EpochLoader(read_split("train", config), data, batch_size=4, seed=2, **cut)


def test_images_are_stretched_whatever_their_shape():
    for width, height in SIZES:
        assert output_size(width, height, EXACT) == (48, 32)
        assert output_size(width, height, EXACT, scale=1.5) == (72, 48)
        assert output_size(width, height, EXACT, shortest=64) == (96, 64)
        assert resized(picture(width, height), EXACT).shape == (3, 48, 32)
    assert EXACT.scaled(1.5).exact_size == (72, 48)
    assert EXACT.scaled(1.0) == EXACT


def test_sides_beside_an_exact_size_are_refused_unless_null():
    with pytest.raises(ValidationError, match="longest_side and shortest_side would have no"):
        PreprocessingConfig(exact_size=(64, 64), shortest_side=64, longest_side=64)
    assert EXACT.shortest_side is EXACT.longest_side is None
    for text in (EXACT.model_dump_json(), PreprocessingConfig().model_dump_json()):
        again = PreprocessingConfig.model_validate_json(text)
        assert again.model_dump_json() == text
    assert plain_tree(EXACT) == {"normalisation": "unit", "exact_size": [48, 32]}
    assert "exact_size" not in plain_tree(PreprocessingConfig())


def test_unit_pixels_are_divided_by_255():
    pixels = to_pixels(picture(9, 7))
    assert torch.equal(normalise(pixels, EXACT), pixels / 255)


def test_batches_of_an_exact_size_have_no_padding(config):
    loader = _loader(config)
    loader.show_teacher(2.0)
    for step in loader.epoch(0):
        for images, targets in step:
            assert images.pixels.shape == (2, 3, 48, 32) and images.padding is None
            assert images.for_teacher.pixels.shape == (2, 3, 96, 64)
            assert images.for_teacher.padding is None
            for number, box in zip(targets.image_ids, targets.boxes_cxcywh[:, 0], strict=True):
                width, height = SIZES[number - 1]
                assert box[2:].tolist() == pytest.approx([20 / width, 10 / height])


def test_one_of_several_sizes_is_drawn_for_each_batch(config):
    sides = (16, 32, 40, 48)
    loader = _loader(config, shortest_sides=sides)
    loader.show_teacher(1.5)
    seen = set()
    for epoch in range(12):
        for step in loader.epoch(epoch):
            [size] = {images.pixels.shape[2:] for images, _ in step}
            assert size[0] == 1.5 * size[1] and size[1] in sides
            assert all(images.padding is None for images, _ in step)
            [theirs] = {images.for_teacher.pixels.shape[3] for images, _ in step}
            assert theirs == 1.5 * size[1]
            seen.add(size[1])
    assert seen == set(sides)
    first = [images.pixels for step in loader.epoch(3) for images, _ in step]
    later = [images.pixels for step in loader.epoch(3, start_step=1) for images, _ in step]
    assert all(torch.equal(a, b) for a, b in zip(first[2:], later, strict=True))


def test_evaluation_shows_the_exact_size(config):
    data = DataConfig(train=config, validation=config, preprocessing=EXACT, workers=0)
    split = read_split("validation", config)
    for images, targets in EvaluationBatches(split, data, batch_size=3, rank=0, world_size=1):
        assert images.pixels.shape[2:] == (48, 32) and images.padding is None
        assert targets.original_sizes[0] in {(height, width) for width, height in SIZES}


def test_objects_that_stretching_makes_small_are_judged_by_their_longer_side(write_split):
    flat = [annotation(1, 1, 7, [10, 10, 12, 2]), annotation(2, 1, 7, [10, 40, 2, 12])]
    split = read_split("train", write_split([(100, 400)], flat))
    warned = _too_small(split, PreprocessingConfig(exact_size=(100, 100)))
    assert "1 of 2 objects" in warned and "raise data.preprocessing.exact_size" in warned
    assert "12.0 become 3.0" in warned
    assert _too_small(split, PreprocessingConfig(exact_size=(400, 100))) is None


def test_an_image_that_resizing_would_make_too_large_is_named(write_split):
    split = read_split("train", write_split([(40, 30), (1, 6000)], []))
    unbounded = PreprocessingConfig(shortest_side=800, longest_side=None)
    wanted = r"2\.png: the image has 1 x 6000 pixels.*3,840 megapixels"
    with pytest.raises(UserError, match=wanted):
        _too_small(split, unbounded)
    with pytest.raises(UserError, match=wanted):
        DetectionDataset(split, unbounded).sizes(0)
