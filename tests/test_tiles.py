"""Tiles: where they lie, and that each object is found once, with a detector that is a stub."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from d3etr import predictions
from d3etr.cli.main import main
from d3etr.cli.predict import LARGEST_TILE, MOST_OVERLAP, SMALLEST_TILE
from d3etr.config.data import PreprocessingConfig
from d3etr.errors import UserError
from d3etr.predictions import Found, ImagePredictor
from d3etr.tiles import windows_of

TILE, SIDE, DIGIT = 64, 160, 12


class Finder(ImagePredictor):
    """Finds rectangles of one colour that are whole or cut off by its image's edge.

    Colour n is class n - 1; what it sees smaller than ``least`` pixels it overlooks.
    """

    def __init__(self, least: int = 4) -> None:
        super().__init__([(7, "one"), (8, "two")], 100, 0.5)
        self.least, self.batches = least, list[int]()

    @property
    def size_rule(self) -> PreprocessingConfig:
        return PreprocessingConfig(shortest_side=TILE, longest_side=None)

    def prepared(self, image: Image.Image) -> NDArray[np.uint8]:
        scale = TILE / min(image.size)
        size = round(scale * image.width), round(scale * image.height)
        return np.asarray(image.resize(size, Image.Resampling.NEAREST)).transpose(2, 0, 1)

    def detect(self, images: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> Found:
        self.batches.append(len(images))
        boxes, scores, labels = np.zeros((len(images), 100, 4)), np.zeros((len(images), 100)), None
        labels = np.zeros((len(images), 100), dtype=np.int64)
        for k, (image, (height, _)) in enumerate(zip(images, sizes, strict=True)):
            scale, count = height / image.shape[1], 0
            for number in np.unique(image[1][image[1] > 0]):  # green: the object
                rows, columns = np.nonzero(image[1] == number)
                box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                if min(box[2:] - box[:2]) >= self.least:
                    boxes[k, count] = scale * box
                    scores[k, count] = 0.9
                    labels[k, count] = image[0][rows[0], columns[0]] - 1  # red: the class
                    count += 1
        return boxes, scores, labels


def scene(objects: Sequence[tuple[int, int, int, int, int]], side: int = SIDE) -> Image.Image:
    """A picture with objects of (class, x1, y1, x2, y2)."""
    pixels = np.zeros((side, side, 3), dtype=np.uint8)
    for number, (label, *box) in enumerate(objects, start=1):
        pixels[box[1] : box[3], box[0] : box[2]] = (label + 1, number, 0)
    return Image.fromarray(pixels)


def grid(count: int) -> list[tuple[int, int, int, int, int]]:
    """Objects in rows and columns, so that tiles cut many of them."""
    step = SIDE // count
    places = [(x, y) for y in range(3, SIDE - DIGIT, step) for x in range(3, SIDE - DIGIT, step)]
    return [(k % 2, x, y, x + DIGIT, y + DIGIT) for k, (x, y) in enumerate(places)]


def test_windows_cover_a_picture_and_overlap() -> None:
    windows = windows_of(SIDE, SIDE, (TILE, TILE), 0.2)
    assert windows[0] == (0, 0, SIDE, SIDE) and len(windows) == 1 + 3 * 3
    covered = np.zeros((SIDE, SIDE), dtype=int)
    for left, top, right, bottom in windows[1:]:
        assert (right - left, bottom - top) == (TILE, TILE)
        covered[top:bottom, left:right] += 1
    assert covered.min() == 1
    for first, second in pairwise(windows[1:4]):
        assert first.right - second.left >= 0.2 * TILE
    assert windows_of(TILE, 30, (TILE, TILE), 0.2) == [(0, 0, TILE, 30)]
    assert windows_of(300, 30, (TILE, TILE), 0.0)[1:][-1] == (236, 0, 300, 30)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_object_is_found_once_whatever_tiles_cut(batch_size: int) -> None:
    objects = grid(7)
    assert len(objects) == 49
    finder = Finder(least=6)  # 12 pixels are too few where 160 are shown as 64
    assert not len(finder.predict(scene(objects))[0])
    [found] = finder.predict(scene(objects), tiles=True, batch_size=batch_size)
    rows = np.column_stack([found.labels - 7, found.boxes_xyxy]).astype(int)
    boxes = {tuple(row) for row in rows.tolist()}
    assert len(found) == len(objects) and boxes == {*objects}
    assert max(finder.batches) == batch_size


def test_a_tiled_picture_has_more_objects_than_one_pass_gives() -> None:
    objects = grid(12)
    assert len(objects) == 144  # a pass gives 100
    [found] = Finder(least=6).predict(scene(objects), tiles=True)
    boxes = sorted(found.boxes_xyxy.astype(int).tolist())
    assert boxes == sorted(box for _, *box in objects)


def test_what_is_larger_than_a_tile_comes_from_the_whole_picture() -> None:
    large, small = (0, 20, 30, 130, 120), (1, 140, 140, 146, 146)
    picture = scene([large, small])
    [whole] = Finder().predict(picture)
    assert len(whole) == 1  # 6 pixels are too few of 160 as 64
    [found] = Finder().predict(picture, tiles=True)
    assert sorted(found.labels) == [7, 8]
    widths = found.boxes_xyxy[:, 2] - found.boxes_xyxy[:, 0]
    assert widths[found.labels == 7] == pytest.approx(110, abs=3)


def test_a_picture_of_one_tile_has_the_same_detections() -> None:
    picture = scene([(0, 5, 5, 30, 30), (1, 40, 20, 60, 50)], TILE)
    [plain], [tiled] = Finder().predict(picture), Finder().predict(picture, tiles=True)
    assert plain.names == tiled.names
    assert np.array_equal(plain.boxes_xyxy, tiled.boxes_xyxy)


def test_settings_without_an_effect_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no effect without tiles"):
        Finder().predict(scene([]), tile_overlap=0.1)
    with pytest.raises(UserError, match="tile_overlap"):
        Finder().predict(scene([]), tiles=True, tile_overlap=0.95)
    with pytest.raises(UserError, match="image 1 of those given"):
        Finder().predict([scene([]), "missing.png"], tiles=TILE)
    assert main(["predict", "w.onnx", "a.png", "--tile-overlap", "0.1"]) == 2
    assert "no effect without --tiles" in capsys.readouterr().err
    limits = predictions.SMALLEST_TILE, predictions.LARGEST_TILE, predictions.MOST_OVERLAP
    assert limits == (SMALLEST_TILE, LARGEST_TILE, MOST_OVERLAP)
