"""What detecting has in common wherever a detector runs: images in, detections out.

Nothing here needs PyTorch, so that exported detectors run without it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d3etr.config.arguments import described, require_number, require_path, require_whole
from d3etr.data.images import load_image, upright_rgb
from d3etr.data.preprocessing import SizeRule
from d3etr.errors import UserError
from d3etr.tiles import Window, cut_off, merge, windows_of

ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
"""A file, a PIL image, or RGB pixels [height, width, 3] of 0 to 255."""
Answer = TypeVar("Answer")
LARGEST_BATCH = 4096
SMALLEST_TILE, LARGEST_TILE = 16, 100_000
TILE_OVERLAP, MOST_OVERLAP = 0.2, 0.9

Sample = tuple[Any, tuple[int, int]]
"""An image as the detector is shown it, uint8 [3, h, w], and its (height, width) as given."""
Found = tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]], NDArray[np.int64]]
"""Boxes [B, K, 4] as x1, y1, x2, y2 in pixels, scores [B, K] and class indices [B, K]."""


@dataclass(frozen=True)
class Detections:
    """What was found on one image: K objects, most certain first.

    Raises UserError if the four do not have K entries each.

    Attributes:
        boxes_xyxy: [K, 4] float32, pixels of the image as given, within its borders.
        scores: [K] float32 in [0, 1].
        labels: [K] int64, category ids of the annotation file that the detector learnt from.
        names: K category names.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.names)
        expected = {"boxes_xyxy": (count, 4), "scores": (count,), "labels": (count,)}
        for name, shape in expected.items():
            if np.shape(getattr(self, name)) != shape:
                found = described(getattr(self, name))
                raise UserError(f"{name} is {found}; {count} names need an array {list(shape)}")

    def __len__(self) -> int:
        return len(self.names)

    def as_dicts(self) -> list[dict[str, Any]]:
        """One plain mapping an object: name, label, score, box_xyxy."""
        columns = zip(self.names, self.labels, self.scores, self.boxes_xyxy, strict=True)
        return [
            {
                "name": name,
                "label": int(label),
                "score": round(float(score), 4),
                "box_xyxy": [round(float(side), 1) for side in box],
            }
            for name, label, score, box in columns
        ]


class ImagePredictor(ABC):
    """A detector of a runtime, with its classes.

    Args:
        categories: (id of the annotation file, name) of each class.
        maximum: detections per image at most; of each tile, and of the whole, of tiled ones.
        threshold: lowest score of a detection where nobody says another.

    Raises:
        UserError: a maximum out of range.
    """

    def __init__(
        self, categories: Sequence[tuple[int, str]], maximum: int, threshold: float
    ) -> None:
        self._maximum = require_whole("maximum", maximum, 1, 10_000)
        self._threshold = threshold
        self._ids = np.array([number for number, _ in categories], dtype=np.int64)
        self._names = tuple(name for _, name in categories)

    @property
    def threshold(self) -> float:
        """Lowest score of a detection where nobody says another."""
        return self._threshold

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, in the order of class indices."""
        return self._names

    @property
    @abstractmethod
    def size_rule(self) -> SizeRule:
        """The size that images are shown to the detector in."""

    @abstractmethod
    def prepared(self, image: Image.Image) -> Any:
        """Uint8 [3, h, w] of an RGB image in the size that the detector is shown."""

    @abstractmethod
    def detect(self, images: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> Found:
        """Detections in B prepared images of one size; boxes may reach over an image's edge.

        Args:
            images: B of what ``prepared`` returned.
            sizes: (height, width) of each image as given.
        """

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        threshold: float | None = None,
        batch_size: int = 8,
        tiles: int | bool = False,
        tile_overlap: float | None = None,
    ) -> list[Detections]:
        """Detect objects.

        Args:
            images: one image or several; a generator is read as detection proceeds.
            threshold: lowest score of a detection, in [0, 1]; None: that of the weights, which had
                the highest F1 on validation, or 0.5 where they carry none.
            batch_size: images, or tiles of one, that go through the detector together.
            tiles: also look at overlapping tiles of images that are larger than one, of so many
                pixels a side, and merge what is found; True: of the size that the detector sees.
            tile_overlap: share of a tile's side that neighbours have in common at least, in
                [0, 0.9]; None: 0.2.

        Returns:
            Detections of each image, in the order given.

        Raises:
            UserError: something that is no image or cannot be read, or a number out of range.
        """
        wanted = self._threshold if threshold is None else threshold
        least = require_number("threshold", wanted, 0, 1)
        batch_size = require_whole("batch_size", batch_size, 1, LARGEST_BATCH)
        if tiles is not False:
            tile, overlap = self._tile(tiles), _overlap(tile_overlap)
            return [
                *_of_each(
                    images,
                    lambda rgb: self._predict_tiled(rgb, tile, overlap, least, batch_size),
                )
            ]
        if tile_overlap is not None:
            raise UserError("tile_overlap has no effect without tiles: leave it out, or give tiles")
        samples = self._samples(images)
        found: list[Detections] = []
        while some := list(islice(samples, batch_size)):
            found += self.predict_samples(some, [least] * len(some))
        return found

    def sample(self, image: ImageLike) -> Sample:
        """An image as the detector is shown it, with its (height, width) as given.

        Raises:
            UserError: it is no image, or cannot be read or shown.
        """
        return _of_one(image, self._sample)

    def predict_samples(
        self, samples: Sequence[Sample], thresholds: Sequence[float]
    ) -> list[Detections]:
        """Detect objects in one pass for each size that prepared images have.

        Args:
            samples: of ``sample``.
            thresholds: lowest score of a detection, for each of them.
        """
        found: dict[int, Detections] = {}
        for indices in of_one_size([image.shape for image, _ in samples]):
            images, sizes = zip(*(samples[index] for index in indices), strict=True)
            columns = self.detect(images, sizes)
            for index, size, *column in zip(indices, sizes, *columns, strict=True):
                found[index] = self._kept(column, size, thresholds[index])
        return [found[index] for index in range(len(samples))]

    def predict_each(
        self, samples: Sequence[Sample], thresholds: Sequence[float]
    ) -> list[Detections | UserError]:
        """As ``predict_samples``; where that fails, each alone, with what is wrong as its answer.

        So one image that takes too much memory leaves the others their detections.
        """
        try:
            return [*self.predict_samples(samples, thresholds)]
        except UserError as error:
            if len(samples) == 1:
                return [error]
        alone = zip(samples, thresholds, strict=True)
        return [self.predict_each([sample], [threshold])[0] for sample, threshold in alone]

    def _samples(self, images: ImageLike | Iterable[ImageLike]) -> Iterator[Sample]:
        return _of_each(images, self._sample)

    def _sample(self, rgb: Image.Image) -> Sample:
        return self.prepared(rgb), (rgb.height, rgb.width)

    def _tile(self, tiles: int | bool) -> tuple[int, int]:
        """(height, width) of tiles."""
        if tiles is not True:
            side = require_whole("tiles", tiles, SMALLEST_TILE, LARGEST_TILE)
            return side, side
        rule = self.size_rule
        side = rule.shortest_side or rule.longest_side or 0
        if rule.exact_size is None and not side:
            raise UserError(
                "tiles: this detector sees images in the size that they have, so that tiles have "
                "none of their own: give it in pixels, for example 640"
            )
        return rule.exact_size or (side, side)

    def _predict_tiled(
        self, rgb: Image.Image, tile: tuple[int, int], overlap: float, least: float, batch: int
    ) -> Detections:
        """Of one image, from the whole and its tiles."""
        windows = windows_of(rgb.width, rgb.height, tile, overlap)
        parts = (rgb.crop(window) if index else rgb for index, window in enumerate(windows))
        samples = map(self._sample, parts)
        found: list[Detections] = []
        while some := list(islice(samples, batch)):
            found += self.predict_samples(some, [least] * len(some))
        if len(windows) == 1:
            return found[0]
        return _merged(found, windows, (rgb.width, rgb.height))

    def _kept(
        self, column: Sequence[NDArray[Any]], size: tuple[int, int], threshold: float
    ) -> Detections:
        boxes, scores, labels = column
        kept = scores >= threshold
        (height, width), indices = size, labels[kept]
        limits = np.array([width, height, width, height], dtype=boxes.dtype)
        return Detections(
            boxes_xyxy=np.minimum(boxes[kept].clip(min=0), limits).astype(np.float32),
            scores=scores[kept].astype(np.float32),
            labels=self._ids[indices],
            names=tuple(self._names[index] for index in indices),
        )


def _of_each(
    images: ImageLike | Iterable[ImageLike], do: Callable[[Image.Image], Answer]
) -> Iterator[Answer]:
    """What ``do`` makes of each image; errors say which image it was."""
    if _is_single(images):
        yield _of_one(cast("ImageLike", images), do)
        return
    for index, image in enumerate(cast("Iterable[ImageLike]", images)):
        try:
            yield _of_one(image, do)
        except UserError as error:
            raise UserError(f"image {index} of those given (from 0): {error}") from error


def _of_one(image: ImageLike, do: Callable[[Image.Image], Answer]) -> Answer:
    rgb = read_image(image)
    try:
        return do(rgb)
    except UserError as error:
        if not isinstance(image, str | os.PathLike):
            raise
        raise UserError(f"{os.fspath(image)}: {error}") from error


def _overlap(given: float | None) -> float:
    given = TILE_OVERLAP if given is None else given
    return require_number("tile_overlap", given, 0, MOST_OVERLAP)


def _merged(
    found: Sequence[Detections], windows: Sequence[Window], size: tuple[int, int]
) -> Detections:
    """One set from those of a picture's windows.

    Args:
        found: of each window, in its pixels.
        windows: of the picture.
        size: (width, height) of the picture.
    """
    moved = [
        part.boxes_xyxy + np.array([*window[:2], *window[:2]], dtype=np.float32)
        for part, window in zip(found, windows, strict=True)
    ]
    cut = [cut_off(boxes, window, *size) for boxes, window in zip(moved, windows, strict=True)]
    boxes = np.concatenate(moved)
    scores = np.concatenate([part.scores for part in found])
    labels = np.concatenate([part.labels for part in found])
    names = [name for part in found for name in part.names]
    origins = np.repeat(np.arange(len(found)), [len(part) for part in found])
    stay = merge(boxes, scores, labels, origins, np.concatenate(cut))
    return Detections(boxes[stay], scores[stay], labels[stay], tuple(names[i] for i in stay))


def of_one_size(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Indices of images of each shape: those go through a detector together.

    Padding is avoided because it reaches group normalisation's statistics: an image's detections
    would depend on its neighbours.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, shape in enumerate(shapes):
        by_shape.setdefault(tuple(shape), []).append(index)
    return [*by_shape.values()]


def read_image(image: ImageLike) -> Image.Image:
    """An image as upright 8-bit RGB.

    Raises:
        UserError: a file that cannot be read, or something that is no RGB image.
    """
    if isinstance(image, str | os.PathLike):
        return load_image(require_path("image", image))
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size:
        if image.ndim == 3 and image.shape[2] == 3:
            return Image.fromarray(np.asarray(image))
    raise UserError(
        f"{described(image)} is no image; expected [height, width, 3] of uint8, in the order red, "
        "green, blue, a PIL image, or a file's path"
    )


def _is_single(images: object) -> bool:
    """Whether this is one image, or nothing that several could be taken from."""
    single = (str, os.PathLike, Image.Image, bytes, bytearray, memoryview, Mapping)
    array_or_file = hasattr(images, "shape") or hasattr(images, "read")
    return array_or_file or isinstance(images, single) or not isinstance(images, Iterable)


def _from_pil(image: Image.Image) -> Image.Image:
    try:
        return upright_rgb(image)
    except UserError as error:
        raise UserError(f"a PIL image of mode {image.mode}: {error}") from error
    except Exception as error:  # it is decoded here, if it was opened only
        raise UserError(f"a PIL image of mode {image.mode} cannot be decoded ({error})") from error
