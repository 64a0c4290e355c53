"""Contenders whose runs only differ by what is put in: image sets, seeds, and a true gain.

A detection's fate follows from one number, its clarity: quality of the run + ease of the image +
ease of the object + what this way of training is good at + chance. Images and objects are as easy
for one contender as for the other, as real ones are; each way of training has objects that it is
better at, whatever the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from d3etr.data.records import ImageRecord
from d3etr.evaluation.coco_metrics import GroundTruth, SplitDetections
from d3etr.evaluation.judge import Contender

CLASSES = ("cat", "dog")
SIDE = 400
IMAGE_SPREAD, OBJECT_SPREAD, OWN_SPREAD, CHANCE = 0.6, 0.8, 0.5, 0.8
FALSE_ALARMS = 2.0
"""Per image, on average."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scenes:
    """An image set; n objects in I images.

    Attributes:
        truth: what is measured against.
        image: [n] the object's image, from 0.
        label: [n].
        boxes: [n, 4] x, y, width, height.
        ease: [n] of image and object.
        images: I.
    """

    truth: GroundTruth
    image: NDArray[np.int64]
    label: NDArray[np.int64]
    boxes: Array
    ease: Array
    images: int


def draw_scenes(random: np.random.Generator, images: int) -> Scenes:
    """Another image set: 1 to 6 objects an image, of all of COCO's sizes."""
    counts = random.integers(1, 7, images)
    image = np.repeat(np.arange(images), counts)
    n = len(image)
    label = random.integers(0, len(CLASSES), n)
    side = np.exp(random.uniform(np.log(16), np.log(200), (n, 1)))
    size = side * np.exp(random.normal(0, 0.3, (n, 2)))
    boxes = np.concatenate([random.uniform(0, SIDE, (n, 2)), size], 1)
    ease = random.normal(0, IMAGE_SPREAD, images)[image] + random.normal(0, OBJECT_SPREAD, n)
    return Scenes(_truth(image, label, boxes, images), image, label, boxes, ease, images)


def _truth(
    image: NDArray[np.int64], label: NDArray[np.int64], boxes: Array, images: int
) -> GroundTruth:
    bounds = np.searchsorted(image, np.arange(images + 1))
    records = []
    for i, (a, b) in enumerate(pairwise(bounds.tolist())):
        own = boxes[a:b]
        crowd = np.zeros(b - a, dtype=bool)
        areas = own[:, 2] * own[:, 3]
        records.append(ImageRecord(i, f"{i}.png", SIDE, SIDE, label[a:b], own, areas, crowd))
    categories = [SimpleNamespace(name=name) for name in CLASSES]
    return GroundTruth(cast(Any, SimpleNamespace(categories=categories, records=records)))


def detect(
    random: np.random.Generator, scenes: Scenes, own: Array, quality: float
) -> SplitDetections:
    """What one run detects.

    Args:
        random: of this run.
        scenes: the image set.
        own: [n] what its way of training is good at.
        quality: of the run.
    """
    n = len(scenes.image)
    clarity = quality + scenes.ease + own + random.normal(0, CHANCE, n)
    found = random.uniform(size=n) < _sigmoid(clarity + 1.5)
    slack = 0.16 * np.exp(-0.5 * clarity)[:, None] * random.normal(0, 1, (n, 4))
    size = scenes.boxes[:, [2, 3, 2, 3]]
    corners = np.concatenate([scenes.boxes[:, :2], scenes.boxes[:, :2] + scenes.boxes[:, 2:]], 1)
    boxes = corners + slack * size
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    scores = _sigmoid(clarity + random.normal(0, 0.8, n))
    wrong = random.poisson(FALSE_ALARMS * scenes.images)
    start = random.uniform(0, SIDE, (wrong, 2))
    alarms = np.concatenate([start, start + random.uniform(10, 200, (wrong, 2))], 1)
    return SplitDetections(
        np.concatenate([scenes.image[found], random.integers(0, scenes.images, wrong)]),
        np.concatenate([scenes.label[found], random.integers(0, len(CLASSES), wrong)]),
        np.concatenate([scores[found], _sigmoid(random.normal(-1.0, 1.0, wrong))]),
        np.concatenate([boxes[found], alarms]),
    )


def contender(
    random: np.random.Generator,
    scenes: Scenes,
    name: str,
    quality: float,
    seeds: int,
    seed_spread: float,
) -> Contender:
    """Runs of one way of training, each of a quality of its own; all but "plain" are distilled."""
    own = random.normal(0, OWN_SPREAD, len(scenes.image))
    qualities = quality + random.normal(0, seed_spread, seeds)
    found = tuple(detect(random, scenes, own, each) for each in qualities)
    return Contender(name, name != "plain", (quality,) * seeds, found)


def mean_map(random: np.random.Generator, quality: float, sets: int, images: int) -> float:
    """MAP of runs of one quality, the mean over image sets of ``images``."""
    found = []
    for _ in range(sets):
        scenes = draw_scenes(random, images)
        own = random.normal(0, OWN_SPREAD, len(scenes.image))
        rows = detect(random, scenes, own, quality)
        found.append(scenes.truth.measure(rows, 100).values["mAP"])
    return float(np.mean(found))


def _sigmoid(x: Array | Sequence[float]) -> Array:
    result: Array = 1 / (1 + np.exp(-np.asarray(x)))
    return result
