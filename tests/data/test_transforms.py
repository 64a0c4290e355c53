import numpy as np
import pytest
import torch
from coco_files import picture
from hypothesis import given
from hypothesis import strategies as st

from d3etr.config.data import PreprocessingConfig
from d3etr.data.images import to_pixels
from d3etr.data.preprocessing import VERY_LONG, output_size
from d3etr.data.transforms import Sample, collate, normalise, relative_cxcywh, resize, resized
from d3etr.errors import UserError

KEPT = PreprocessingConfig(shortest_side=None, longest_side=None)


@pytest.mark.parametrize(
    ("size", "sides", "expected"),
    [
        ((640, 480), (800, 1333), (800, 1066)),
        ((480, 640), (800, 1333), (1066, 800)),
        ((1000, 300), (800, 1333), (400, 1333)),
        ((640, 480), (480, 1333), (480, 640)),
        ((640, 480), (None, None), (480, 640)),
        ((640, 480), (None, 320), (240, 320)),
        ((5000, 2), (16, 100), (1, 100)),
        ((5000, 1), (800, 1333), (1, 1333)),
        ((1, 50_000_000), (800, 1333), (1333, 1)),
        ((1600, 2), (800, 1333), (2, 1333)),
        ((1, 20_000), (None, None), (20_000, 1)),
    ],
)
def test_sizes_follow_detrs_rule(size, sides, expected):
    config = PreprocessingConfig(shortest_side=sides[0], longest_side=sides[1])
    assert output_size(*size, config) == expected


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_sizes_keep_to_their_bounds(width, height):
    config = PreprocessingConfig(shortest_side=800, longest_side=1333)
    result = output_size(width, height, config)
    # DETR rounds the short side to whole pixels first, so the long one may pass a little.
    ratio = max(width, height) / min(width, height)
    slack = ratio if ratio <= VERY_LONG else 0
    assert 1 <= min(result) <= 800
    assert max(result) <= 1333 + slack
    assert min(result) == 800 or max(result) >= 1333 - slack - 1


@given(st.integers(100, 3000), st.integers(100, 3000))
def test_sizes_of_usual_images_are_detrs_to_the_pixel(width, height):
    config = PreprocessingConfig(shortest_side=800, longest_side=1333)
    low, high, side = min(width, height), max(width, height), 800
    if high / low * side > 1333:
        side = round(1333 * low / high)
    if side == low:
        expected = height, width
    elif width < height:
        expected = int(side * height / width), side
    else:
        expected = side, int(side * width / height)
    assert output_size(width, height, config) == expected


def test_enlarging_that_no_memory_holds_is_refused():
    unbounded = PreprocessingConfig(shortest_side=800, longest_side=None)
    assert resized(picture(1, 20), unbounded).shape[1:] == (16_000, 800)
    with pytest.raises(
        UserError, match=r"1 x 20000 pixels.*12,800 megapixels; expected at most 90"
    ):
        resized(picture(1, 20_000), unbounded)
    # Made smaller, it takes less than it does already.
    assert output_size(20_000, 10_000, unbounded) == (800, 1600)
    with pytest.raises(UserError, match="longest_side"):
        output_size(20_000, 1, unbounded, scale=2.0)


def test_imagenet_normalisation_is_torchvisions():
    pixels = to_pixels(picture(12, 10))
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    config = KEPT.model_copy(update={"normalisation": "imagenet"})
    torch.testing.assert_close(normalise(pixels, config), (pixels / 255 - mean) / std)


def test_per_image_normalisation_uses_each_channels_own_mean_and_deviation():
    pixels = to_pixels(picture(12, 10))
    values = pixels.double() / 255
    mean = values.mean((1, 2), keepdim=True)
    std = values.std((1, 2), keepdim=True, correction=0)
    config = KEPT.model_copy(update={"normalisation": "per_image"})
    expected = ((values - mean) / (std + 0.02)).float()
    torch.testing.assert_close(normalise(pixels, config), expected, atol=1e-5, rtol=1e-5)


def test_an_even_image_becomes_zeros():
    config = KEPT.model_copy(update={"normalisation": "per_image"})
    assert normalise(torch.full((3, 4, 4), 77, dtype=torch.uint8), config).abs().max() < 1e-5


def test_resizing_and_normalising_leave_their_input_as_it_is():
    pixels = to_pixels(picture(20, 20))
    before = pixels.clone()
    result = normalise(resize(pixels, (16, 16)), KEPT)
    assert result.shape == (3, 16, 16)
    normalise(pixels, KEPT)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("normalisation", ["imagenet", "per_image"])
def test_a_place_in_a_batch_is_normalised_like_an_image_alone(normalisation):
    config = KEPT.model_copy(update={"normalisation": normalisation})
    samples = [_sample(23, 31, 1), _sample(20, 40, 1)]
    for number, sample in enumerate(samples):
        sample.pixels.copy_(to_pixels(picture(*sample.pixels.shape[:0:-1], seed=number)))
    images, _ = collate(samples, config)
    assert torch.equal(images.pixels[0, :, :, :31], normalise(samples[0].pixels, config))
    assert torch.equal(images.pixels[1, :, :20], normalise(samples[1].pixels, config))
    assert not images.pixels[0, :, :, 31:].any() and not images.pixels[1, :, 20:].any()


def test_relative_boxes_are_centre_and_size():
    boxes = relative_cxcywh(np.array([[10.0, 20.0, 30.0, 30.0]]), height=40, width=100)
    np.testing.assert_allclose(boxes, [[0.2, 0.625, 0.2, 0.25]])


def _sample(height: int, width: int, objects: int, number: int = 0) -> Sample:
    return Sample(
        pixels=torch.full((3, height, width), 255, dtype=torch.uint8),
        labels=np.arange(objects),
        boxes_cxcywh=np.full((objects, 4), 0.5, dtype=np.float32),
        image_id=number,
        original_size=(height, width),
    )


def test_images_of_one_size_have_no_padding():
    images, targets = collate([_sample(4, 6, 1, 7), _sample(4, 6, 0, 9)], KEPT)
    assert images.padding is None
    assert images.pixels.shape == (2, 3, 4, 6)
    assert targets.image_ids == (7, 9) and targets.counts == (1, 0)


def test_smaller_images_are_padded_right_and_below():
    images, targets = collate([_sample(4, 6, 3), _sample(2, 8, 1)], KEPT)
    assert images.pixels.shape == (2, 3, 4, 8)
    assert images.padding is not None
    assert torch.equal(images.pixels[:, 0] == 0, images.padding)
    assert images.padding[0, :, :6].sum() == 0 and images.padding[0, :, 6:].all()
    assert images.padding[1, :2].sum() == 0 and images.padding[1, 2:].all()
    assert targets.labels.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert targets.boxes_cxcywh[1].tolist() == [[0.5] * 4, [0.0] * 4, [0.0] * 4]
    assert targets.original_sizes == ((4, 6), (2, 8))


def test_a_batch_may_hold_no_object_at_all():
    _, targets = collate([_sample(4, 4, 0), _sample(4, 4, 0)], KEPT)
    assert targets.labels.shape == (2, 0) and targets.boxes_cxcywh.shape == (2, 0, 4)


def test_a_given_size_pads_even_equal_images():
    images, _ = collate([_sample(4, 4, 0)], KEPT, (5, 4))
    assert images.padding is not None and images.padding.sum() == 4
