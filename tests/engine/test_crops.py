import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d3etr.config.data import SplitConfig
from d3etr.config.training import PretrainingConfig
from d3etr.data.splits import DetectionSplit, read_split
from d3etr.engine.pretraining import MARGIN, cut_crops

OBJECTS = {(10, 20, 20, 20): (255, 0, 0), (70, 60, 10, 24): (0, 255, 0)}
"""Box (x, y, width, height) -> colour, on black; red is class 0, green class 1."""


@pytest.fixture
def split(tmp_path: Path) -> DetectionSplit:
    """Four equal images of 100 x 90 pixels with two objects each."""
    pixels = np.zeros((90, 100, 3), dtype=np.uint8)
    for (x, y, width, height), colour in OBJECTS.items():
        pixels[y : y + height, x : x + width] = colour
    images, annotations = [], []
    for image in range(4):
        Image.fromarray(pixels).save(tmp_path / f"{image}.png")
        images.append({"id": image, "file_name": f"{image}.png", "width": 100, "height": 90})
        for category, box in enumerate(OBJECTS):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 0, "name": "red"}, {"id": 1, "name": "green"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(content))
    return read_split("train", SplitConfig(images=tmp_path, annotations=file))


def test_crops_hold_their_object_in_the_middle(split: DetectionSplit) -> None:
    config = PretrainingConfig(crop_size=20, context=0.0, backgrounds=0.0)
    crops, labels = cut_crops(split, config, seed=0)
    assert crops.shape == (8, 3, 28, 28) and crops.dtype == torch.uint8
    assert labels.tolist() == [0, 1] * 4
    for pixels, label in zip(crops, labels.tolist(), strict=True):
        assert pixels[label, 14, 14] == 255
        assert pixels.float().mean((1, 2)).argmax() == label
    # 20 pixels of red in a window of 20 * MARGIN, at one pixel a pixel
    assert crops[0, 0, 14].gt(127).sum() == pytest.approx(28 / MARGIN, abs=1)


def test_backgrounds_hardly_touch_objects(split: DetectionSplit) -> None:
    config = PretrainingConfig(crop_size=20, context=0.0, backgrounds=1.0)
    crops, labels = cut_crops(split, config, seed=0)
    background = crops[labels == 2]
    assert len(background) == 8
    middle = background[:, :, 4:24, 4:24].float().sum(1)
    assert middle.mean() < 0.1 * 255


def test_more_objects_than_fit_are_sampled_and_seeds_repeat(split: DetectionSplit) -> None:
    config = PretrainingConfig(crop_size=20, backgrounds=0.0, maximum_crops=4)
    (first, _), (again, _) = cut_crops(split, config, seed=3), cut_crops(split, config, seed=3)
    assert 0 < len(first) < 8
    assert torch.equal(first, again)
