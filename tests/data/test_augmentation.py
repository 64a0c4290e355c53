import numpy as np
import pytest
import torch
from coco_files import picture
from hypothesis import given
from hypothesis import strategies as st

from d3etr.config.data import AugmentationConfig, PreprocessingConfig
from d3etr.data.augmentation import (
    Augmentation,
    augment_boxes,
    augment_pixels,
    draw_augmentation,
    sample_generator,
)
from d3etr.data.images import to_pixels

KEPT = PreprocessingConfig(shortest_side=None, longest_side=None)
EVERYTHING = AugmentationConfig(
    shortest_sides=(24, 32, 40),
    horizontal_flip=0.5,
    vertical_flip=0.5,
    crop=0.5,
    colour_jitter=0.3,
    channel_permutation=0.5,
    inversion=0.5,
)


def _plan(config: AugmentationConfig, *seed: int, size: tuple[int, int] = (60, 40)) -> Augmentation:
    return draw_augmentation(*size, config, KEPT, sample_generator(*seed))


def test_draws_depend_on_seed_epoch_and_index_alone():
    assert _plan(EVERYTHING, 1, 2, 3) == _plan(EVERYTHING, 1, 2, 3)
    plans = {_plan(EVERYTHING, *seed) for seed in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]}
    assert len(plans) == 4


def test_switching_one_transform_on_leaves_the_others_draws():
    flips = AugmentationConfig(horizontal_flip=0.5)
    both = AugmentationConfig(horizontal_flip=0.5, inversion=0.5, colour_jitter=0.2)
    for index in range(50):
        first, second = _plan(flips, 0, 0, index), _plan(both, 0, 0, index)
        assert first.horizontal_flip == second.horizontal_flip


@pytest.mark.parametrize(
    ("setting", "happens"),
    [
        ("horizontal_flip", lambda plan: plan.horizontal_flip),
        ("vertical_flip", lambda plan: plan.vertical_flip),
        ("crop", lambda plan: plan.crop is not None),
        ("channel_permutation", lambda plan: plan.channels is not None),
        ("inversion", lambda plan: plan.inverted),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_transforms_happen_as_often_as_configured(setting, happens, share):
    config = AugmentationConfig(**({"horizontal_flip": 0.0} | {setting: share}))
    found = np.mean([happens(_plan(config, 0, 0, index)) for index in range(1000)])
    assert found == pytest.approx(share, abs=0.06)


def test_every_scale_and_channel_order_is_drawn_alike():
    config = AugmentationConfig(shortest_sides=(24, 32, 40), channel_permutation=1.0)
    plans = [_plan(config, 0, 0, index) for index in range(1200)]
    _, scales = np.unique([plan.size[0] for plan in plans], return_counts=True)
    _, orders = np.unique([plan.channels for plan in plans], axis=0, return_counts=True)
    assert len(scales) == 3 and scales.min() > 330
    assert len(orders) == 6 and orders.min() > 150


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 10**6))
def test_crops_lie_inside_and_keep_at_least_half_of_each_side(width, height, index):
    plan = _plan(AugmentationConfig(crop=1.0), 0, 0, index, size=(width, height))
    assert plan.crop is not None
    top, left, rows, columns = plan.crop
    assert 0 <= top and top + rows <= height and 0 <= left and left + columns <= width
    assert rows >= height / 2 - 0.5 and columns >= width / 2 - 0.5


def _marked(boxes: np.ndarray, height: int, width: int) -> torch.Tensor:
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    for left, top, right, bottom in boxes.astype(int):
        pixels[:, top:bottom, left:right] = 255
    return pixels


@pytest.mark.parametrize("index", range(30))
def test_boxes_move_with_what_they_enclose(index):
    config = AugmentationConfig(
        shortest_sides=(80, 120), crop=0.7, horizontal_flip=0.5, vertical_flip=0.5
    )
    box = np.array([[20.0, 12.0, 44.0, 36.0]])
    plan = _plan(config, 0, 0, index, size=(60, 40))
    moved, kept = augment_boxes(box, (40, 60), plan)
    drawn = augment_pixels(_marked(box, 40, 60), plan)[0] > 127
    assert drawn.shape == plan.size
    rows, columns = torch.nonzero(drawn.any(1)), torch.nonzero(drawn.any(0))
    assert kept.all()
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(moved[0], found, atol=1.5)


def test_objects_that_a_crop_leaves_out_are_marked():
    plan = Augmentation(size=(20, 20), crop=(0, 0, 20, 20))
    boxes = np.array([[0.0, 0, 10, 10], [30, 30, 40, 40], [15, 15, 40, 40], [19.5, 0, 30, 10]])
    moved, kept = augment_boxes(boxes, (40, 40), plan)
    assert kept.tolist() == [True, False, True, False]
    assert moved[2].tolist() == [15, 15, 20, 20]


def test_tiny_objects_survive_where_nothing_is_cropped():
    boxes = np.array([[1.0, 1.0, 1.5, 1.5]])
    plan = Augmentation(size=(40, 40), horizontal_flip=True)
    assert augment_boxes(boxes, (40, 40), plan)[1].tolist() == [True]


def test_no_boxes_stay_no_boxes():
    plan = Augmentation(size=(20, 20), crop=(0, 0, 20, 20), horizontal_flip=True)
    moved, kept = augment_boxes(np.zeros((0, 4)), (40, 40), plan)
    assert moved.shape == (0, 4) and kept.shape == (0,)


def test_colours_change_as_planned_and_the_input_stays():
    pixels = to_pixels(picture(8, 8))
    before = pixels.clone()
    plan = Augmentation(size=(8, 8), channels=(2, 0, 1), inverted=True)
    assert torch.equal(augment_pixels(pixels, plan), 255 - pixels[[2, 0, 1]])
    bright = augment_pixels(pixels, Augmentation(size=(8, 8), jitter=(1.5, 1.0, 1.0, 0.0)))
    assert bright.float().mean() > pixels.float().mean()
    everything = draw_augmentation(8, 8, EVERYTHING, KEPT, sample_generator(0, 0, 5))
    augment_pixels(pixels, everything)
    assert torch.equal(pixels, before)


def test_the_plan_that_changes_nothing_changes_nothing():
    pixels = to_pixels(picture(8, 8))
    assert torch.equal(augment_pixels(pixels, Augmentation(size=(8, 8))), pixels)
