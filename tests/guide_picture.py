"""The guide's picture: what the teacher that comes with d3etr finds in three scenes.

python tests/guide_picture.py docs/images/guide-predict.png
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

import d3etr
from d3etr.config.data import DigitScenesConfig
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.drawing import draw

SCENES, GAP = 3, 8
WEIGHTS = Path(__file__).resolve().parent.parent / "trainers/weights/digits-teacher.safetensors"


def main(target: Path) -> None:
    """Draw scenes side by side."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"train_images": 1, "validation_images": 1, "test_images": SCENES}
        config = DigitScenesConfig(root=Path(folder), seed=3, **sizes)
        files = sorted(Path(str(write_digit_scenes(config)["test"].images)).iterdir())
        pictures = [Image.open(file).convert("RGB") for file in files]
    found = d3etr.load(WEIGHTS, "cpu").predict(pictures)
    drawn = [draw(*both) for both in zip(pictures, found, strict=True)]  # which enlarges them
    step = drawn[0].width + GAP
    row = Image.new("RGB", (SCENES * step - GAP, drawn[0].height), "white")
    for place, picture in enumerate(drawn):
        row.paste(picture, (place * step, 0))
    row.save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
