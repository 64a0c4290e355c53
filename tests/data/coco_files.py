"""Pictures and annotation entries for tests."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture, so that resizing and JPEG change little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def annotation(number: int, image: int, category: int, bbox: Sequence[float], **more: Any) -> Any:
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox), **more}
