"""What a replica does with pictures, without Ray's processes."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray import serve

from d3etr.errors import UserError
from d3etr.inference import Predictor, load
from d3etr.predictions import Found
from d3etr.serving.answers import Answer
from d3etr.serving.replica import PROBLEM, Replica, _require_few_pixels
from d3etr.serving.service import a_picture
from d3etr.serving.settings import ServeSettings


def png(seed: int = 0, size: tuple[int, int] = (40, 56)) -> bytes:
    """A picture of noise, height and width in pixels."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def replica(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Replica:
    # Ray's batches ask the replica that they are in how many requests it takes.
    context = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=16))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    return Replica(ServeSettings(str(tiny_weights), batch_wait_ms=1000, max_megapixels=1))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images in each pass through the detector; one of 33 x 33 pixels takes too much memory."""
    counted: list[int] = []
    detect = Predictor.detect

    def count(self: Predictor, images: Any, sizes: Sequence[tuple[int, int]]) -> Found:
        counted.append(len(images))
        if (33, 33) in sizes:
            raise UserError("there is too little memory")
        return detect(self, images, sizes)

    monkeypatch.setattr(Predictor, "detect", count)
    return counted


def ask(replica: Replica, *pictures: bytes) -> list[Answer]:
    """All answers at threshold 0 to pictures that are sent at once."""

    async def together() -> list[Answer]:
        return list(await asyncio.gather(*(replica.detect(one, 0.0) for one in pictures)))

    return asyncio.run(together())


def test_pictures_of_one_size_go_through_the_detector_together(
    replica: Replica, passes: list[int], tiny_weights: Path
) -> None:
    sent = [png(seed) for seed in range(6)] + [png(seed, (48, 48)) for seed in (6, 7)]
    answers = ask(replica, *sent)
    assert sorted(passes) == [2, 6]
    alone = load(tiny_weights)
    for picture, answer in zip(sent, answers, strict=True):
        [expected] = alone.predict(Image.open(io.BytesIO(picture)), threshold=0)
        found = answer.body["detections"]
        assert answer.status == 200 and len(found) == len(expected) > 5
        assert [each["name"] for each in found] == [*expected.names]
        boxes = [each["box_xyxy"] for each in found]
        np.testing.assert_allclose(boxes, expected.boxes_xyxy, atol=0.06)


def test_a_bad_picture_fails_alone(
    replica: Replica, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Predictor, "prepared", lambda self, image: of_one_size(image))
    bad = [b"<html>", png(size=(1001, 1000)), png()[:-40], png(size=(33, 33))]
    answers = ask(replica, png(1), *bad, png(2), png(3))
    assert [answer.status for answer in answers] == [200, 400, 413, 400, 400, 200, 200]
    texts = [str(answer.body.get("error")) for answer in answers[1:5]]
    for text, expected in zip(
        texts, ("is no picture", "1.0 megapixels", "truncated", "memory"), strict=True
    ):
        assert expected in text
    assert passes[0] == 4, "they were in one batch"


@pytest.mark.parametrize("most", [50, 0.3072, 0.3, 1e-3, 1e-6])
def test_the_first_picture_of_a_service_is_within_its_limit(most: float) -> None:
    picture = a_picture(most)
    _require_few_pixels(picture, most)
    width, height = Image.open(io.BytesIO(picture)).size
    assert width * height > 0.9 * min(most * 1e6, 640 * 480)


def of_one_size(image: Image.Image) -> Any:
    """Of one size whatever the picture's, so that all are in one pass."""
    import torch

    pixels = np.asarray(image.resize((32, 32)), dtype=np.uint8).copy()
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        Replica(ServeSettings(str(tmp_path / "nothing.onnx")))
    text = json.loads(str(caught.value).removeprefix(PROBLEM))
    assert "nothing.onnx does not exist" in text
