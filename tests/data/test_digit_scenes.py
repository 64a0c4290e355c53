import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from d3etr.config.data import DataConfig, DigitScenesConfig, SplitConfig
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.data.digit_scenes.drawing import SPLITS, _iou, divide, draw_scene, load_divided_digits
from d3etr.data.digit_scenes.folder import _write_digests, png_bytes, scenes_folder, split_paths
from d3etr.data.splits import open_split
from d3etr.errors import UserError

# Changes only together with VERSION: published results are compared by it.
PINNED_DIGESTS = {
    "train": "4fe2b4cd35db72a4",
    "validation": "1d14b22668a7ed90",
    "test": "311b9eb46ad74b29",
}


def _config(root: Path, **changes) -> DigitScenesConfig:
    settings = {"root": root, "train_images": 12, "validation_images": 4, "test_images": 6}
    return DigitScenesConfig(**(settings | changes))


def _annotations(split: SplitConfig):
    return json.loads(split.annotations.read_text())


@pytest.fixture(scope="module")
def train_digits():
    return load_divided_digits()["train"]


def test_the_benchmark_is_what_its_version_says(tmp_path):
    write_digit_scenes(_config(tmp_path))
    written = json.loads((scenes_folder(_config(tmp_path)) / "digest.json").read_text())
    assert {name: split["digest"][:16] for name, split in written["splits"].items()} == (
        PINNED_DIGESTS
    )


@pytest.mark.slow
def test_the_default_benchmark_is_the_published_one(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        write_digit_scenes(DigitScenesConfig(root=tmp_path))
    assert caplog.text == ""


def test_a_default_benchmark_drawn_differently_is_a_warning(tmp_path, caplog):
    config = DigitScenesConfig(root=tmp_path)
    scenes_folder(config).mkdir()
    for split in split_paths(scenes_folder(config)).values():
        split.images.mkdir(parents=True)
        split.annotations.parent.mkdir(exist_ok=True)
        split.annotations.write_text("{}")
    with caplog.at_level(logging.WARNING):
        _write_digests(config, scenes_folder(config))
    assert "differ from version 1 as published" in caplog.text


def test_no_handwritten_digit_is_in_two_splits():
    labels = load_digits().target
    parts = divide(labels)
    together = np.concatenate([parts[name] for name in SPLITS])
    assert sorted(together) == list(range(1797))
    for label in range(10):
        shares = [np.mean(np.isin(np.flatnonzero(labels == label), parts[n])) for n in SPLITS]
        np.testing.assert_allclose(shares, [0.6, 0.15, 0.25], atol=0.01)


def test_scenes_use_the_digits_of_their_own_split(tmp_path):
    splits = write_digit_scenes(_config(tmp_path))
    labels = load_digits().target
    parts = divide(labels)
    for name in SPLITS:
        entries = _annotations(splits[name])["annotations"]
        assert {entry["digit"] for entry in entries} <= set(parts[name].tolist())
        assert all(labels[entry["digit"]] == entry["category_id"] for entry in entries)


def test_an_image_depends_on_its_index_and_not_on_how_many_there_are(tmp_path):
    few = write_digit_scenes(_config(tmp_path))["train"]
    more = write_digit_scenes(_config(tmp_path, train_images=15))["train"]
    other = write_digit_scenes(_config(tmp_path, seed=1))["train"]
    file = "000007.png"
    assert (few.images / file).read_bytes() == (more.images / file).read_bytes()
    assert (few.images / file).read_bytes() != (other.images / file).read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_written_is_read_as_a_coco_split(tmp_path):
    data = DataConfig(digit_scenes=_config(tmp_path))
    split = open_split(data, "validation")
    assert [category.name for category in split.categories] == [str(n) for n in range(10)]
    assert len(split.records) == 4
    assert split.cleaning["clipped"] == () and split.cleaning["zero_size"] == ()
    with Image.open(split.path(split.records[0])) as image:
        assert (image.mode, image.size) == ("RGB", (64, 64))


def test_sizes_counts_and_overlaps_keep_to_the_settings(tmp_path, train_digits):
    config = _config(tmp_path, minimum_objects=2, maximum_objects=4, image_size=96)
    scenes = [draw_scene(config, "train", index, train_digits) for index in range(200)]
    counts = {len(scene.digits) for scene in scenes}
    assert counts == {2, 3, 4}
    boxes = np.concatenate([scene.boxes_xyxy for scene in scenes])
    longest = (boxes[:, 2:] - boxes[:, :2]).max(1)
    # A tight box may lose a pixel of faint ink on either side.
    assert 8 <= longest.min() and longest.max() <= 28
    small, large = np.sum(longest <= 14), np.sum(longest >= 20)
    assert 0.6 < small / large < 1.6
    assert boxes.min() >= 0 and boxes.max() <= 96
    for scene in scenes:
        pairs = [(a, b) for i, a in enumerate(scene.boxes_xyxy) for b in scene.boxes_xyxy[:i]]
        assert all(_iou(a, b) <= 0.2 for a, b in pairs)


def test_boxes_are_tight_around_the_ink(tmp_path, train_digits, monkeypatch):
    config = _config(tmp_path, minimum_objects=1, maximum_objects=1)
    module = "d3etr.data.digit_scenes.drawing"
    monkeypatch.setattr(
        f"{module}._background", lambda side, generator: Image.new("RGB", (side, side), (0, 0, 0))
    )
    monkeypatch.setattr(f"{module}._contrasting", lambda behind, generator: (255, 255, 255))
    monkeypatch.setattr(f"{module}._with_noise", lambda pixels, generator: pixels)
    for index in range(20):
        scene = draw_scene(config, "train", index, train_digits)
        rows, columns = np.nonzero(scene.pixels[:, :, 0] >= 64)
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert found == scene.boxes_xyxy[0]


def test_digits_stand_out_from_what_is_behind_them(tmp_path, train_digits, monkeypatch):
    config = _config(tmp_path)
    seen = []
    module = "d3etr.data.digit_scenes.drawing"
    from d3etr.data.digit_scenes import drawing as scene_module

    real = scene_module._contrasting

    def watched(behind, generator):
        colour = real(behind, generator)
        mean = np.asarray(behind, float).mean((0, 1))
        seen.append(np.abs(np.array(colour) - mean).mean() / 255)
        return colour

    monkeypatch.setattr(f"{module}._contrasting", watched)
    for index in range(100):
        draw_scene(config, "train", index, train_digits)
    assert np.mean(np.array(seen) > 0.345) > 0.99


def test_a_written_folder_is_used_again_and_a_damaged_one_written_again(tmp_path, caplog):
    config = _config(tmp_path)
    train = write_digit_scenes(config)["train"]
    file = train.images / "000003.png"
    whole, written = file.read_bytes(), file.stat().st_mtime_ns
    write_digit_scenes(config)
    assert file.stat().st_mtime_ns == written
    file.write_bytes(whole[:-30] + b"\0" + whole[-29:])
    with caplog.at_level(logging.WARNING):
        write_digit_scenes(config)
    assert "split train is not as it was written" in caplog.text
    assert str(scenes_folder(config)) in caplog.text
    assert file.read_bytes() == whole
    (train.annotations).unlink()
    write_digit_scenes(config)
    assert train.annotations.exists()
    assert [path.name for path in tmp_path.iterdir()] == [scenes_folder(config).name]


def test_an_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("d3etr.data.digit_scenes.folder.draw_scene", fail)
    with pytest.raises(KeyboardInterrupt):
        write_digit_scenes(_config(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_no_space_is_a_clear_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d3etr.data.digit_scenes.folder.png_bytes", full)
    with pytest.raises(UserError, match=r"digit_scenes\.root: .*No space left.*1 MB of space"):
        write_digit_scenes(_config(tmp_path))


def test_settings_that_cannot_be_met_are_refused(tmp_path):
    config = _config(
        tmp_path, minimum_objects=9, maximum_objects=9, minimum_scale=60, maximum_scale=64
    )
    with pytest.raises(UserError, match=r"9 digits of 60 to 64 pixels do not fit into 64 x 64"):
        write_digit_scenes(config)


def test_progress_is_told(tmp_path):
    told = []
    write_digit_scenes(_config(tmp_path), lambda *call: told.append(call))
    assert told == [
        ("digit scenes, train", 12, 12),
        ("digit scenes, validation", 4, 4),
        ("digit scenes, test", 6, 6),
    ]


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (200, 150)])
def test_png_files_hold_their_pixels(tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = tmp_path / "image.png"
    file.write_bytes(png_bytes(pixels))
    with Image.open(file) as image:
        image.verify()
    with Image.open(file) as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_a_split_that_is_not_configured_is_named(tmp_path):
    nowhere = SplitConfig(images=tmp_path, annotations=tmp_path / "a.json")
    data = DataConfig(train=nowhere, validation=nowhere)
    with pytest.raises(UserError, match=r"data\.test is not set.*configured: train, validation"):
        open_split(data, "test")
