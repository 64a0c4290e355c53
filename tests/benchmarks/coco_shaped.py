"""Annotations and detections with the numbers of COCO's: objects, sizes, classes, crowds."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CLASSES = 80
WIDTH, HEIGHT = 640, 480
OBJECTS, CLASSES_IN_IMAGE = 7.3, 2.9
"""Of an image, COCO's means."""
AREA_SHARES = (0.41, 0.34, 0.25)
"""Of small, medium and large objects."""
SIDES = ((6, 32), (32, 96), (96, 400))
"""Pixels of their square roots of areas."""
CROWDS = 0.01
CATEGORIES = tuple((number + 1, f"class {number}") for number in range(CLASSES))


def annotations(images: int, random: np.random.Generator) -> dict[str, Any]:
    """A COCO detection file of images with the ids 1, 2, ..."""
    frequencies = 1.0 / np.arange(1, CLASSES + 1)  # few classes are on most images
    objects = []
    for image in range(1, images + 1):
        present = random.choice(
            CLASSES,
            1 + random.poisson(CLASSES_IN_IMAGE - 1),
            p=frequencies / frequencies.sum(),
        )
        count = random.geometric(1 / OBJECTS)
        boxes = _boxes(count, random)
        for label, box in zip(random.choice(present, count), boxes.tolist(), strict=True):
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image,
                    "category_id": CATEGORIES[label][0],
                    "bbox": box,
                    "area": 0.7 * box[2] * box[3],
                    "iscrowd": int(random.random() < CROWDS),
                }
            )
    return {
        "images": [
            {"id": n, "width": WIDTH, "height": HEIGHT, "file_name": f"{n}.jpg"}
            for n in range(1, images + 1)
        ],
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES],
        "annotations": objects,
    }


def detections(content: dict[str, Any], each: int, random: np.random.Generator) -> Array:
    """[images * each, 7] image id, label, score, x1, y1, x2, y2: a fair detector's best ``each``.

    Half of an image's detections lie near its objects, mostly with the right class; the others
    lie anywhere, mostly with a class that is there, and score less.
    """
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        by_image[entry["image_id"]].append(entry)
    return np.concatenate(
        [_of_image(image, entries, each, random) for image, entries in by_image.items()]
    )


def _of_image(
    image: int, entries: list[dict[str, Any]], each: int, random: np.random.Generator
) -> Array:
    boxes, labels = _boxes(each, random), np.array([e["category_id"] - 1 for e in entries])
    found = labels[random.integers(len(entries), size=each)]
    near = each // 2
    chosen = random.integers(len(entries), size=near)
    truth = np.array([entry["bbox"] for entry in entries])[chosen]
    scale = truth[:, [2, 3, 2, 3]]
    boxes[:near] = truth + random.normal(0, 0.1, (near, 4)) * scale
    found[:near] = labels[chosen]
    found = np.where(random.random(each) < 0.2, random.integers(CLASSES, size=each), found)
    scores = np.r_[random.beta(2, 3, near), random.beta(1, 12, each - near)]
    corners = np.c_[boxes[:, :2], boxes[:, :2] + np.maximum(boxes[:, 2:], 1)]
    rows = np.c_[np.full(each, image), found, scores, corners]
    order: Array = rows[np.argsort(-scores)]
    return order


def _boxes(count: int, random: np.random.Generator) -> Array:
    """[count, 4] xywh within the image."""
    low, high = np.array(SIDES, dtype=np.float64)[random.choice(3, count, p=AREA_SHARES)].T
    side = low * (high / low) ** random.random(count)
    aspect = np.exp(random.normal(0, 0.5, count))
    sizes = np.c_[side * aspect, side / aspect].clip(1, [WIDTH, HEIGHT])
    corners = random.random((count, 2)) * ([WIDTH, HEIGHT] - sizes)
    return np.c_[corners, sizes]
