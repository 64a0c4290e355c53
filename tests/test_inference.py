"""d3etr.load(tiny_weights).predict(images)."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d3etr.config.data import PreprocessingConfig, SplitConfig
from d3etr.data.dataset import DetectionDataset
from d3etr.data.splits import read_split
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


@pytest.mark.parametrize(
    ("evaluation", "threshold"),
    [
        (None, 0.5),
        ({"mAP": 0.2}, 0.5),
        ({"threshold": 0.34}, 0.34),
        ({"threshold": 7}, 0.5),
        ({"threshold": "high"}, 0.5),
    ],
)
def test_the_threshold_is_that_of_the_weights(
    predictor: Predictor, evaluation: dict[str, Any] | None, threshold: float
) -> None:
    info = predictor.info.model_copy(update={"evaluation": evaluation})
    own = Predictor(predictor.detector, info, predictor.device)
    assert info.threshold == threshold
    [found], [expected] = own.predict(noise(40, 40)), predictor.predict(noise(40, 40), threshold)
    assert found.scores.tolist() == expected.scores.tolist()
    [asked] = own.predict(noise(40, 40), threshold=0)
    assert len(asked) > len(found)


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


@pytest.mark.parametrize("kind", ["rotated", "grey", "alpha", "palette", "16 bit", "16 bit TIFF"])
def test_prediction_shows_a_detector_the_pixels_that_evaluation_does(
    predictor: Predictor, kind: str, tmp_path: Path
) -> None:
    picture = Image.fromarray(noise(40, 56))
    exif = Image.Exif()
    file = tmp_path / ("image.jpg" if kind == "rotated" else "image.png")
    if kind == "rotated":
        exif[0x0112] = 6
        picture.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    elif kind.startswith("16 bit"):
        file = file.with_suffix(".tif") if "TIFF" in kind else file
        deep = np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 29
        Image.fromarray(deep).save(file)
        scaled = np.asarray(read_image(file))[:, :, 0]
        np.testing.assert_array_equal(scaled, deep // 257)
    else:
        picture.convert({"grey": "L", "alpha": "RGBA", "palette": "P"}[kind]).save(file)
    content = {
        "images": [{"id": 1, "file_name": file.name, "width": 56, "height": 40}],
        "categories": [{"id": 3, "name": "tree"}],
        "annotations": [],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    split = read_split("test", SplitConfig(images=tmp_path, annotations=tmp_path / "a.json"))
    [evaluated] = DetectionDataset(split, predictor.info.preprocessing)
    [(from_file, _)] = predictor._samples(file)
    with Image.open(file) as opened:
        [(from_pil, _)] = predictor._samples(opened)
    assert torch.equal(from_file, evaluated.pixels)
    assert torch.equal(from_pil, evaluated.pixels)


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


def test_several_images_come_in_any_iterable(predictor: Predictor, tmp_path: Path) -> None:
    for index in range(3):
        Image.fromarray(noise(24, 32, index)).save(tmp_path / f"{index}.png")
    expected = [predictor.predict(noise(24, 32, index), 0)[0].as_dicts() for index in range(3)]
    files = sorted(tmp_path.iterdir())
    pixels = [noise(24, 32, index) for index in range(3)]
    for several in (files, tuple(files), (f for f in files), map(str, files), iter(pixels)):
        found = predictor.predict(several, 0, batch_size=2)
        assert [each.as_dicts() for each in found] == expected
    assert predictor.predict(iter([])) == []


RGB = noise(8, 8)
NO_IMAGES = {
    "None": (None, "None is no image"),
    "number": (7, "7 is no image"),
    "true": (True, "True is no image"),
    "bytes": (b"GIF89a", "a bytes is no image"),
    "bytearray": (bytearray(b"x"), "a bytearray is no image"),
    "memoryview": (memoryview(b"x"), "a memoryview is no image"),
    "open file": (io.BytesIO(b"x"), "a BytesIO is no image"),
    "mapping": ({"image": RGB}, "a dict is no image"),
    "class": (Image.Image, "a type is no image"),
    "empty text": ("", "image is ''; expected a path"),
    "no file": ("no such picture", "no such image file"),
    "null character": ("a\0b.png", "expected a path"),
    "long name": ("x" * 5000, "File name too long"),
    "URL": ("https://user:secret@host.invalid/a.png?key=secret", "is the URL https://host"),
    "torn URL": ("https:/host/a.png", "did you mean 'https://host/a.png'"),
    "folder": (Path("."), "Is a directory"),
    "grey": (RGB[:, :, 0], r"an array \[8, 8\] of uint8 is no image"),
    "alpha": (np.zeros((8, 8, 4), np.uint8), r"an array \[8, 8, 4\] of uint8 is no image"),
    "channels first": (
        RGB.transpose(2, 0, 1)[:, :, :5],
        r"\[3, 8, 5\] of uint8 is no",
    ),
    "batch": (np.stack([RGB, RGB]), r"an array \[2, 8, 8, 3\] of uint8 is no image"),
    "floats": (RGB / 255, r"of float64 is no image"),
    "NaN": (np.full((8, 8, 3), np.nan), "of float64 is no image"),
    "16 bit": (RGB.astype(np.uint16), "of uint16 is no image"),
    "integers": (RGB.astype(np.int64), "of int64 is no image"),
    "truth values": (RGB > 9, "of bool is no image"),
    "complex": (RGB * 1j, "of complex128 is no image"),
    "texts": (np.array([["a"]]), "is no image"),
    "objects": (np.array([RGB, None], dtype=object), "of object is no image"),
    "one number": (np.uint8(3), "3 is no image"),
    "no dimensions": (np.array(3), "is no image"),
    "empty crop": (RGB[90:99], r"an array \[0, 8, 3\] of uint8 is no image"),
    "tensor": (torch.zeros(3, 8, 8), r"a Tensor \[3, 8, 8\] of torch.float32"),
    "PIL of no size": (Image.fromarray(RGB).crop((1, 1, 1, 5)), r"no pixels \(0 x 4\)"),
    "PIL of floats": (Image.new("F", (4, 4)), "floating-point pixels"),
    "PIL in La": (Image.new("La", (4, 4)), "mode La cannot be converted"),
    "list of None": ([RGB, None], r"image 1 of those given \(from 0\): None is no image"),
    "nested list": ([[RGB]], "image 0 .*: a list is no image"),
    "pixels as lists": ([RGB.tolist()], "image 0 .*: a list is no image"),
    "tuple of numbers": ((1, 2), "image 0 .*: 1 is no image"),
    "generator of None": ((None for _ in range(2)), "image 0 .*: None is no image"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_refused_with_what_was_found(
    predictor: Predictor, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    given, text = NO_IMAGES[name]
    with pytest.raises(UserError, match=f"(?s){text}") as refusal:
        predictor.predict(given)  # type: ignore[arg-type]
    assert "secret" not in str(refusal.value)
    assert not recwarn.list


def test_pil_images_that_were_opened_only_or_closed_are_judged(
    predictor: Predictor, tmp_path: Path
) -> None:
    file = tmp_path / "picture.png"
    Image.fromarray(noise(40, 40)).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    with Image.open(file) as opened, pytest.raises(UserError, match=r"cannot be decoded.*trunc"):
        predictor.predict(opened)
    closed = Image.fromarray(noise(8, 8))
    closed.close()
    with pytest.raises(UserError, match="a PIL image of mode"):
        predictor.predict(closed)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16"]
)
def test_pil_images_of_other_modes_are_converted(predictor: Predictor, mode: str) -> None:
    assert len(predictor.predict(Image.new(mode, (20, 16)), threshold=0)[0]) == 15


def test_one_pixel_and_strips_are_images(predictor: Predictor) -> None:
    for shape in ((1, 1), (4, 4), (1, 200), (200, 1)):
        assert len(predictor.predict(noise(*shape), threshold=0)[0]) == 15


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"threshold": 1.01}, "threshold is 1.01; expected a number from 0 to 1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": "0.5"}, "threshold is '0.5'"),
        ({"threshold": True}, "threshold is True"),
        ({"threshold": [0.5]}, "threshold is a list"),
        ({"threshold": np.array([0.5])}, r"threshold is an array \[1\] of float64"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"batch_size": 2.0}, "batch_size is 2.0; expected a whole number from 1"),
        ({"batch_size": "8"}, "batch_size is '8'"),
        ({"batch_size": None}, "batch_size is None"),
        ({"batch_size": 10**5000}, "batch_size is a number of very many digits"),
    ],
)
def test_numbers_for_predict_have_types_and_bounds(
    predictor: Predictor, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        predictor.predict([], **options)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_names_the_images_and_the_remedy(
    predictor: Predictor, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(predictor.detector, "encode", fail)
    with pytest.raises(UserError, match=r"2 images of 56 x 40 pixels.*smaller batch_size"):
        predictor.predict([noise(40, 56), noise(40, 56)])


def test_numbers_of_numpy_are_numbers(predictor: Predictor) -> None:
    [found] = predictor.predict(RGB, threshold=np.float32(0), batch_size=np.int64(2))  # type: ignore[arg-type]
    assert len(found) == 15


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        (None, "weights is None; expected a path or URL"),
        (7, "weights is 7"),
        ("", "weights is ''"),
        (b"w.safetensors", "weights is a bytes"),
        ("a\0b", "weights is "),
        ("x" * 5000, "File name too long"),
        (["a"], "weights is a list"),
        (".", "is a folder, not a file"),
        ("none.safetensors", "does not exist"),
    ],
)
def test_weights_that_are_no_file_are_refused(weights: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        load(weights)


@pytest.mark.parametrize("device", ["", "cuda:99", "meta", "cpu:x", 0, True, 1.5, ["cpu"], b"cpu"])
def test_devices_that_cannot_be_used_are_refused(tiny_weights: Path, device: Any) -> None:
    with pytest.raises(UserError, match=r"^device "):
        load(tiny_weights, device=device)


def test_a_predictor_and_detections_judge_what_they_are_made_of(predictor: Predictor) -> None:
    with pytest.raises(UserError, match=r"a Predictor of None.*d3etr\.load"):
        Predictor(None, predictor.info, torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="maximum is 0"):
        Predictor(predictor.detector, predictor.info, torch.device("cpu"), maximum=0)
    boxes = np.zeros((2, 4), np.float32)
    with pytest.raises(UserError, match=r"boxes_xyxy is an array \[2, 4\].*need an array \[1, 4\]"):
        Detections(boxes, np.zeros(1, np.float32), np.zeros(1, np.int64), ("tree",))
    nan = Detections(boxes[:1] + np.nan, np.zeros(1, np.float32), np.zeros(1, np.int64), ("a",))
    with pytest.raises(UserError, match="not finite"):
        draw(RGB, nan)
    with pytest.raises(UserError, match="detections is a list; expected Detections"):
        draw(RGB, [nan])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="None is no image"):
        draw(None, predictor.predict(RGB)[0])  # type: ignore[arg-type]


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


def test_a_strip_is_drawn_without_growing_beyond_measure(predictor: Predictor) -> None:
    strip = np.zeros((1, 50_000, 3), np.uint8)
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, np.int64), ())
    assert draw(strip, nothing).size == (50_000, 1)
    assert draw(strip[:, :1000], nothing).size == (4000, 4)


def test_drawing_leaves_the_picture_as_it_was() -> None:
    picture = Image.new("RGB", (500, 500), "white")
    box = np.array([[0, 0, 500, 500], [490, 1, 499, 3]], dtype=np.float32)
    draw(picture, Detections(box, np.ones(2, np.float32), np.array([1, 2]), ("a", "b" * 99)))
    assert picture.getcolors() == [(250000, (255, 255, 255))]
