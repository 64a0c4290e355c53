"""d3etr.load(tiny_weights).predict(images)."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d3etr.config.data import PreprocessingConfig
from d3etr.drawing import READABLE_SIDE, draw
from d3etr.errors import UserError
from d3etr.inference import Detections, Predictor, load, read_image

CATEGORIES = ((3, "tree"), (7, "cat"), (90, "dog"))


@pytest.fixture(scope="module")
def predictor(tiny_weights: Path) -> Predictor:
    return load(tiny_weights, device="cpu")


def noise(
    height: int, width: int, seed: int = 0
) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_all_kinds_of_input_give_the_same(predictor: Predictor, tmp_path: Path) -> None:
    pixels = noise(40, 56)
    picture = Image.fromarray(pixels)
    path = tmp_path / "picture.png"
    picture.save(path)
    found = [predictor.predict(image, 0)[0] for image in (pixels, picture, path, str(path))]
    for other in found[1:]:
        np.testing.assert_array_equal(other.boxes_xyxy, found[0].boxes_xyxy)
        np.testing.assert_array_equal(other.scores, found[0].scores)


def test_detections_have_their_promised_shapes_and_order(predictor: Predictor) -> None:
    [found] = predictor.predict(noise(40, 56), threshold=0)
    assert len(found) == 15, "5 queries x 3 classes"
    assert found.boxes_xyxy.shape == (15, 4)
    assert found.boxes_xyxy.dtype == np.float32
    assert (np.diff(found.scores) <= 0).all()


def test_labels_are_the_annotation_files_ids(predictor: Predictor) -> None:
    [found] = predictor.predict(noise(40, 56), threshold=0)
    names = dict(CATEGORIES)
    assert set(found.labels.tolist()) == set(names)
    assert found.names == tuple(names[label] for label in found.labels.tolist())


def test_boxes_stay_within_the_original_picture(predictor: Predictor) -> None:
    [found] = predictor.predict(noise(40, 56), threshold=0)
    assert found.boxes_xyxy.min() >= 0
    assert found.boxes_xyxy[:, [0, 2]].max() <= 56
    assert found.boxes_xyxy[:, [1, 3]].max() <= 40


def test_boxes_are_in_pixels_of_the_picture_before_resizing(tiny_weights: Path) -> None:
    predictor = load(tiny_weights)
    predictor.info = predictor.info.model_copy(
        update={"preprocessing": PreprocessingConfig(normalisation="per_image", shortest_side=32)}
    )
    small = noise(32, 32)
    large = small.repeat(4, axis=0).repeat(4, axis=1)
    [found_small], [found_large] = predictor.predict(small, 0), predictor.predict(large, 0)
    np.testing.assert_allclose(
        found_large.boxes_xyxy[:3].mean(), 4 * found_small.boxes_xyxy[:3].mean(), rtol=0.3
    )


def test_batches_of_unlike_pictures_give_what_single_ones_give(predictor: Predictor) -> None:
    images = [noise(40, 56, 1), noise(64, 32, 2), noise(48, 48, 3)]
    together = predictor.predict(images, threshold=0, batch_size=3)
    for image, found in zip(images, together, strict=True):
        [alone] = predictor.predict(image, threshold=0)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)
        np.testing.assert_allclose(
            np.sort(found.boxes_xyxy, axis=0), np.sort(alone.boxes_xyxy, axis=0), atol=1e-2
        )


def test_the_threshold_drops_what_is_below(predictor: Predictor) -> None:
    [everything] = predictor.predict(noise(40, 40), threshold=0)
    middle = float(everything.scores[6])
    [found] = predictor.predict(noise(40, 40), threshold=middle)
    assert len(found) == 7
    assert found.scores.min() >= middle


def test_nothing_found_is_an_empty_result(predictor: Predictor) -> None:
    [found] = predictor.predict(noise(40, 40), threshold=1)
    assert len(found) == 0
    assert found.boxes_xyxy.shape == (0, 4)
    assert found.as_dicts() == []
    assert predictor.predict([]) == []


def test_plain_mappings_hold_plain_values(predictor: Predictor) -> None:
    [found] = predictor.predict(noise(40, 40), threshold=0)
    first = found.as_dicts()[0]
    assert set(first) == {"name", "label", "score", "box_xyxy"}
    assert type(first["label"]) is int
    assert type(first["score"]) is float


def test_greyscale_and_rotated_pictures_are_read_upright() -> None:
    picture = Image.fromarray(noise(20, 30)).convert("L")
    picture.getexif()[0x0112] = 6
    assert read_image(picture).mode == "RGB"
    assert read_image(picture).size == (20, 30)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4, 3))]
)
def test_arrays_that_are_no_pictures_are_refused(array: np.ndarray) -> None:  # type: ignore[type-arg]
    with pytest.raises(UserError, match=r"is no image; expected \[height, width, 3\]"):
        read_image(array)


def test_missing_pictures_and_bad_numbers_are_user_errors(predictor: Predictor) -> None:
    with pytest.raises(UserError, match=r"nowhere\.png"):
        predictor.predict("nowhere.png")
    with pytest.raises(UserError, match="threshold is 50"):
        predictor.predict(noise(8, 8), threshold=50)
    with pytest.raises(UserError, match="batch_size is 0"):
        predictor.predict(noise(8, 8), batch_size=0)


def test_a_device_that_is_not_there_is_a_user_error(tiny_weights: Path) -> None:
    with pytest.raises(UserError, match="device 'abacus' cannot be used here"):
        load(tiny_weights, device="abacus")


def test_small_pictures_are_enlarged_for_drawing_and_boxes_with_them() -> None:
    box = np.array([[16, 16, 48, 48]], dtype=np.float32)
    found = Detections(box, np.array([0.9], np.float32), np.array([3]), ("tree",))
    drawn = draw(Image.new("RGB", (64, 64), "white"), found)
    factor = drawn.width // 64
    assert drawn.width >= READABLE_SIDE
    assert drawn.getpixel((32 * factor, 48 * factor)) != (255, 255, 255), "lower edge"
    assert drawn.getpixel((32 * factor, 32 * factor)) == (255, 255, 255), "inside"


def test_drawing_leaves_the_picture_as_it_was() -> None:
    picture = Image.new("RGB", (500, 500), "white")
    box = np.array([[0, 0, 500, 500], [490, 1, 499, 3]], dtype=np.float32)
    draw(picture, Detections(box, np.ones(2, np.float32), np.array([1, 2]), ("a", "b" * 99)))
    assert picture.getcolors() == [(250000, (255, 255, 255))]
