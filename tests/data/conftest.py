"""Small COCO-format folders, made on the spot."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from coco_files import picture

from d3etr.config.data import SplitConfig

CATEGORIES = [{"id": 7, "name": "cup"}, {"id": 0, "name": "cat"}, {"id": 3, "name": "dog"}]

WriteSplit = Callable[..., SplitConfig]


@pytest.fixture
def write_split(tmp_path: Path) -> WriteSplit:
    """Write images of given sizes (ids 1, 2, ...) and an annotation file."""

    def write(
        sizes: Sequence[tuple[int, int]],
        annotations: Sequence[Any] = (),
        *,
        name: str = "train",
        categories: Sequence[Any] = CATEGORIES,
        change: Callable[[dict[str, Any]], None] | None = None,
    ) -> SplitConfig:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        images = []
        for number, (width, height) in enumerate(sizes, start=1):
            # The same number in two splits must not be the same picture.
            seed = number + 1000 * len(list(tmp_path.glob("*.json")))
            picture(width, height, seed).save(folder / f"{number}.png")
            images.append(
                {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
            )
        content = {
            "images": images,
            "annotations": list(annotations),
            "categories": list(categories),
        }
        # A copy: a change must not reach the next test.
        content = json.loads(json.dumps(content))
        if change is not None:
            change(content)
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(content))
        return SplitConfig(images=folder, annotations=file)

    return write
