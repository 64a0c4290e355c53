"""A folder of JPEG files that cost as much to decode as COCO's, with annotations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.coco_shaped import HEIGHT, WIDTH, annotations
from d3etr.config.data import SplitConfig

NOISE = 15.0
QUALITY = 92
"""With that noise, files have 160 KB, COCO's mean."""


def write_photos(folder: Path, images: int) -> SplitConfig:
    """Write ``images`` files of 640 x 480 pixels and what is on them."""
    random = np.random.default_rng(0)
    content = annotations(images, random)
    for image in content["images"]:
        photo(random).save(folder / image["file_name"], quality=QUALITY)
    file = folder / "annotations.json"
    file.write_text(json.dumps(content))
    return SplitConfig(images=str(folder), annotations=str(file))


def photo(random: np.random.Generator) -> Image.Image:
    """Smooth shapes of many sizes and noise."""
    values = random.normal(0, NOISE, (HEIGHT, WIDTH, 3)) + 128
    for cells in (4, 16, 64):
        coarse = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        shapes = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        values += (np.asarray(shapes, dtype=np.float64) - 128) / cells**0.5
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
