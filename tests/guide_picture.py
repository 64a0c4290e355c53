"""The guide's pictures of digit scenes: its data, how training shows it, and what a teacher finds.

python tests/guide_picture.py docs/images
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import d3etr
from d3etr.config.data import AugmentationConfig, DigitScenesConfig, PreprocessingConfig
from d3etr.data.dataset import DetectionDataset
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.data.records import to_xyxy
from d3etr.data.splits import DetectionSplit, read_split
from d3etr.drawing import PALETTE, draw, draw_boxes

SCENES, GAP, COLOURS = 3, 8, 256
MOST_BYTES = 60_000
OF_THE_GUIDE = {"train_images": SCENES, "validation_images": 1, "test_images": 1, "image_size": 96}
"""The scenes of ``shop`` in docs/guide.md: a picture does not depend on how many there are."""
WEIGHTS = Path(__file__).resolve().parent.parent / "trainers/weights/digits-teacher.safetensors"


def shop(folder: Path) -> DetectionSplit:
    """The first training images of the guide."""
    config = DigitScenesConfig(root=folder, **OF_THE_GUIDE)
    return read_split("train", write_digit_scenes(config)["train"])


def labelled(folder: Path) -> list[Image.Image]:
    """Training images with their labels."""
    split = shop(folder)
    return [
        boxed(Image.open(split.path(record)), record.boxes_xyxy, record.labels, split)
        for record in split.records
    ]


def looks(folder: Path) -> list[Image.Image]:
    """One training image as it is, and as two epochs show it by the recipes that init writes."""
    split = shop(folder)
    augmentation = AugmentationConfig(horizontal_flip=0.5, colour_jitter=0.2)
    sizes = PreprocessingConfig(shortest_side=None, longest_side=None)
    shown = DetectionDataset(split, sizes, augmentation)
    pictures = labelled(folder)[:1]
    for epoch in (0, 1):
        sample = shown.sample(0, epoch)
        pixels = np.ascontiguousarray(sample.pixels.permute(1, 2, 0).numpy())
        height, width = pixels.shape[:2]
        centre, size = np.split(sample.boxes_cxcywh * [width, height, width, height], 2, axis=1)
        boxes = to_xyxy(np.concatenate([centre - size / 2, size], axis=1))
        pictures.append(boxed(Image.fromarray(pixels), boxes, sample.labels, split))
    return pictures


def found(folder: Path) -> list[Image.Image]:
    """Test images with what the teacher that comes with d3etr finds."""
    sizes = {"train_images": 1, "validation_images": 1, "test_images": SCENES}
    config = DigitScenesConfig(root=folder, seed=3, **sizes)
    files = sorted(Path(str(write_digit_scenes(config)["test"].images)).iterdir())
    pictures = [Image.open(file).convert("RGB") for file in files]
    detections = d3etr.load(WEIGHTS, "cpu").predict(pictures)
    return [draw(*both) for both in zip(pictures, detections, strict=True)]


def boxed(
    picture: Image.Image, boxes: np.ndarray, labels: np.ndarray, split: DetectionSplit
) -> Image.Image:
    """A picture with boxes and names of classes."""
    names = [split.categories[label].name for label in labels]
    colours = [PALETTE[label % len(PALETTE)] for label in labels]
    return draw_boxes(picture.convert("RGB"), boxes, names, colours)


def save_row(pictures: Sequence[Image.Image], target: Path) -> None:
    """Pictures of one size side by side."""
    step = pictures[0].width + GAP
    row = Image.new("RGB", (len(pictures) * step - GAP, pictures[0].height), "white")
    for place, picture in enumerate(pictures):
        row.paste(picture, (place * step, 0))
    row.save(target, optimize=True)
    if target.stat().st_size > MOST_BYTES:  # noise of fewer colours takes half of them
        row.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)


def main(folder: Path) -> None:
    """Write all pictures into a folder."""
    for name, make in {"data": labelled, "looks": looks, "predict": found}.items():
        with tempfile.TemporaryDirectory() as scenes:
            save_row(make(Path(scenes)), folder / f"guide-{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
