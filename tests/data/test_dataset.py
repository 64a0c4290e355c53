import numpy as np
import pytest
import torch
from coco_files import annotation, picture

from d3etr.config.data import AugmentationConfig, PreprocessingConfig
from d3etr.data.dataset import DetectionDataset
from d3etr.data.images import load_image
from d3etr.data.splits import read_split
from d3etr.data.transforms import resized
from d3etr.errors import UserError

RESIZED = PreprocessingConfig(shortest_side=24, longest_side=64)


@pytest.fixture
def split(write_split):
    boxes = [annotation(1, 1, 7, [5, 5, 20, 10]), annotation(2, 1, 0, [0, 0, 9, 9], iscrowd=1)]
    return read_split("train", write_split([(40, 30), (30, 50)], boxes))


def test_evaluation_samples_equal_what_inference_does(split):
    sample = DetectionDataset(split, RESIZED)[0]
    image = load_image(split.path(split.records[0]))
    assert torch.equal(sample.pixels, resized(image, RESIZED))
    assert sample.labels.tolist() == [2]
    np.testing.assert_allclose(sample.boxes_cxcywh, [[15 / 40, 10 / 30, 20 / 40, 10 / 30]])
    assert (sample.image_id, sample.original_size) == (1, (30, 40))


def test_an_image_without_objects_gives_empty_targets(split):
    sample = DetectionDataset(split, RESIZED)[1]
    assert sample.labels.shape == (0,) and sample.boxes_cxcywh.shape == (0, 4)


def test_planned_sizes_are_the_sizes_of_the_samples(split):
    augmentation = AugmentationConfig(shortest_sides=(20, 28), crop=0.5)
    dataset = DetectionDataset(split, RESIZED, augmentation)
    for epoch in range(6):
        for index, size in enumerate(dataset.sizes(epoch).tolist()):
            assert list(dataset.sample(index, epoch).pixels.shape[1:]) == size


def test_the_cache_changes_nothing(split):
    augmentation = AugmentationConfig(inversion=0.5, channel_permutation=0.5, crop=0.3)
    cached = DetectionDataset(split, RESIZED, augmentation)
    uncached = DetectionDataset(split, RESIZED, augmentation, cache_bytes=0)
    for epoch in range(8):
        first, second = cached.sample(0, epoch), uncached.sample(0, epoch)
        assert torch.equal(first.pixels, second.pixels)
        assert np.array_equal(first.boxes_cxcywh, second.boxes_cxcywh)


def test_small_splits_are_decoded_once_and_large_ones_each_time(split, monkeypatch):
    decoded = []

    def load(path, size):
        decoded.append(path.name)
        return load_image(path, size)

    monkeypatch.setattr("d3etr.data.record_images.load_image", load)
    cached = DetectionDataset(split, RESIZED)
    uncached = DetectionDataset(split, RESIZED, cache_bytes=100)
    for _ in range(3):
        cached[0], uncached[1]
    assert decoded.count("1.png") == 1 and decoded.count("2.png") == 3


def test_damaged_images_name_file_and_id(split):
    file = split.path(split.records[1])
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=r"image id 2: .*2\.png: cannot be decoded"):
        DetectionDataset(split, RESIZED)[1]


def test_an_image_of_another_size_than_annotated_is_refused(split):
    picture(31, 50).save(split.path(split.records[1]))
    with pytest.raises(UserError, match=r"image id 2: .* is 31 x 50 pixels.*says 30 x 50"):
        DetectionDataset(split, RESIZED)[1]


def test_decoded_gives_the_pixels_as_annotated(split):
    pixels = DetectionDataset(split, RESIZED).decoded(0)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 30, 40)
