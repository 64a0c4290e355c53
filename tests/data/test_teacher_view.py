"""The same augmented picture at another size for the teacher."""

import itertools

import numpy as np
import pytest
import torch
from coco_files import annotation
from torch import Tensor

from d3etr.config.data import AugmentationConfig, DataConfig, PreprocessingConfig
from d3etr.data.augmentation import augment_pixels
from d3etr.data.dataset import DetectionDataset
from d3etr.data.loading import EpochLoader
from d3etr.data.preprocessing import output_size
from d3etr.data.splits import read_split
from d3etr.structures import ImageBatch

SIZES = [(40, 30), (30, 40), (36, 36), (48, 30)] * 4
RESIZED = PreprocessingConfig(shortest_side=16, longest_side=24)
EVERYTHING = AugmentationConfig(
    crop=0.5,
    shortest_sides=(16, 20),
    colour_jitter=0.3,
    channel_permutation=0.5,
    inversion=0.5,
    vertical_flip=0.5,
)


@pytest.fixture
def config(write_split):
    return write_split(SIZES, [annotation(n, n, 7, [4, 4, 16, 12]) for n in range(1, 17)])


@pytest.fixture
def split(config):
    return read_split("train", config)


def _dataset(split, scale: float, augmentation=EVERYTHING) -> DetectionDataset:
    dataset = DetectionDataset(split, RESIZED, augmentation, seed=3)
    dataset.teacher_scale = scale
    return dataset


def _loader(config, split, scale: float, *, rank=0, world_size=1, parts=1) -> EpochLoader:
    data = DataConfig(
        train=config,
        validation=config,
        workers=0,
        preprocessing=RESIZED,
        augmentation=EVERYTHING,
    )
    cut = {"parts": parts, "rank": rank, "world_size": world_size}
    loader = EpochLoader(split, data, batch_size=8, seed=5, **cut)
    loader.show_teacher(scale)
    return loader


def _rows(images: ImageBatch) -> list[tuple[Tensor, Tensor | None]]:
    padding = images.padding
    count = len(images.pixels)
    return [(images.pixels[n], None if padding is None else padding[n]) for n in range(count)]


@pytest.mark.parametrize("scale", [0.5, 2.0, 3.3])
def test_the_students_picture_does_not_know_of_the_teachers(split, scale):
    alone, beside = _dataset(split, 1.0), _dataset(split, scale)
    for epoch, index in itertools.product(range(3), range(len(split.records))):
        one, two = alone.sample(index, epoch), beside.sample(index, epoch)
        assert torch.equal(one.pixels, two.pixels) and one.teacher_pixels is None
        assert np.array_equal(one.boxes_cxcywh, two.boxes_cxcywh)
        assert two.teacher_pixels is not None


def test_the_teachers_picture_is_the_originals_by_the_same_plan(split):
    dataset = _dataset(split, 2.0)
    larger = DetectionDataset(
        split,
        PreprocessingConfig(shortest_side=32, longest_side=48),
        EVERYTHING.model_copy(update={"shortest_sides": (32, 40)}),
        seed=3,
    )
    for epoch, index in itertools.product(range(3), range(len(split.records))):
        theirs = dataset.sample(index, epoch).teacher_pixels
        assert torch.equal(theirs, larger.sample(index, epoch).pixels)
    # An enlarged picture of the student's would be another one.
    plan = dataset.plan(0, 0)
    student = augment_pixels(dataset.decoded(0), plan)
    blown = torch.nn.functional.interpolate(student[None].float(), plan.teacher_size)[0]
    assert (blown - dataset.sample(0, 0).teacher_pixels.float()).abs().mean() > 1


def test_planned_sizes_are_those_of_both_pictures(split):
    for augmentation in (EVERYTHING, AugmentationConfig()):
        dataset = _dataset(split, 1.7, augmentation)
        for index, sizes in enumerate(dataset.sizes(2).tolist()):
            sample = dataset.sample(index, 2)
            shapes = (*sample.pixels.shape[1:], *sample.teacher_pixels.shape[1:])
            assert sizes == [*shapes]


def test_images_of_evaluation_are_as_large_as_the_teachers(split):
    seen = DetectionDataset(split, RESIZED, image_scale=2.0)
    shown = _dataset(split, 2.0, AugmentationConfig(horizontal_flip=0.0))
    assert seen.sizes(0).tolist() == shown.sizes(0)[:, 2:].tolist()
    assert torch.equal(seen[3].pixels, shown.sample(3, 0).teacher_pixels)
    doubled = RESIZED.scaled(2.0)
    assert doubled is not None and RESIZED.scaled(1.0) is RESIZED
    assert [list(output_size(w, h, doubled)) for w, h in SIZES] == seen.sizes(0).tolist()
    assert PreprocessingConfig(shortest_side=None).scaled(2.0) is None


def test_both_pictures_of_a_step_are_the_same_however_it_is_cut(config, split):
    whole = list(_loader(config, split, 2.0).epoch(1))
    parts = [_loader(config, split, 2.0, rank=r, world_size=2, parts=4) for r in range(2)]
    plain = list(_loader(config, split, 1.0).epoch(1))
    for step, own, alone in zip(
        whole, zip(*(loader.epoch(1) for loader in parts), strict=True), plain, strict=True
    ):
        (images, _), (before, _) = step[0], alone[0]
        assert torch.equal(images.pixels, before.pixels) and before.for_teacher is None
        assert images.for_teacher.pixels.shape[2] > 1.5 * images.pixels.shape[2]
        for kind in (lambda batch: batch, lambda batch: batch.for_teacher):
            cut = [row for part in own for made, _ in part for row in _rows(kind(made))]
            for (pixels, padding), (other, hidden) in zip(_rows(kind(images)), cut, strict=True):
                assert torch.equal(pixels, other)
                shown = torch.zeros_like(pixels[0], dtype=torch.bool)
                first, second = (shown if x is None else x for x in (padding, hidden))
                assert torch.equal(first, second)


def test_each_picture_is_padded_by_its_own_mask(config, split):
    for step in _loader(config, split, 2.0).epoch(0):
        for images, _ in step:
            for each in (images, images.for_teacher):
                if each.padding is not None:
                    hidden = each.pixels.abs().sum(1)[each.padding]
                    assert (hidden == 0).all()
                    assert (~each.padding).flatten(1).any(1).all()
