"""Pictures reach an RT-DETR as Hugging Face's image processor prepares them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_imported_detections import write_pictures

from d3etr.data.images import load_image
from d3etr.data.transforms import normalise, resized
from d3etr.detectors.imports.preprocessing import preprocessing_of

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (640, 640)),
        ({"size": {"height": 96, "width": 160}}, (96, 160)),
        ({"size": {"height": 64, "width": 64}, "do_normalize": True}, (64, 64)),
    ],
    ids=["as published", "not square", "normalised"],
)
def test_pixels_equal_rt_detrs(
    options: dict[str, object], size: tuple[int, int], tmp_path: Path
) -> None:
    processor = transformers.RTDetrImageProcessor(**options)
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    config = preprocessing_of(settings, "preprocessor_config.json")
    assert config.exact_size == size
    assert config.normalisation == ("imagenet" if options.get("do_normalize") else "unit")
    for path in write_pictures(tmp_path):
        with Image.open(path) as picture:
            theirs = processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        ours = normalise(resized(load_image(path), config), config)
        torch.testing.assert_close(ours, theirs[0], atol=2e-6, rtol=1e-6)
