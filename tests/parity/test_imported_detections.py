"""Imported detectors find what Hugging Face's find: the same scores, labels and boxes.

From picture files to detections, with their image processors and their post-processing, and on
to average precision.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_detector_parity import KINDS, Kind, _hugging_face
from test_rt_detr_parity import VARIANTS, their_model

from d3etr.cli.main import main
from d3etr.detectors.imports.importing import import_weights
from d3etr.inference import Detections, load

transformers = pytest.importorskip("transformers")

PROCESSORS = {
    "detr": "DetrImageProcessor",
    "conditional_detr": "ConditionalDetrImageProcessor",
    "dab_detr": "ConditionalDetrImageProcessor",
    "deformable_detr": "DeformableDetrImageProcessor",
}
PICTURES = ((96, 130), (70, 64), (150, 96))
"""(height, width); the second one is enlarged, the others are not resized."""
NAMES = {0: "N/A", 1: "person", 2: "bicycle", 3: "N/A", 4: "motorcycle", 5: "bus", 6: "train"}
UNNAMED = [slot for slot, name in NAMES.items() if name == "N/A"]


def write_pictures(folder: Path) -> list[Path]:
    """Smooth colours with rectangles on them, as PNG."""
    generator = np.random.default_rng(0)
    paths = []
    for index, (height, width) in enumerate(PICTURES):
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], -1).astype(np.uint8)
        for _ in range(5):
            top, left = generator.integers(0, [height - 20, width - 20])
            pixels[top : top + 20, left : left + 25] = generator.integers(0, 256, 3)
        paths.append(folder / f"{index}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def save_theirs(folder: Path, kind: Kind, **options: Any) -> tuple[Any, Any]:
    """Their model and image processor, written as users have them."""
    torch.manual_seed(kind.seed)
    model = _hugging_face(kind)
    processor = getattr(transformers, PROCESSORS[kind.name])(
        size={"shortest_edge": 96, "longest_edge": 200}
    )
    model.config.id2label = NAMES
    model.config.label2id = {name: slot for slot, name in NAMES.items()}
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    return model, processor


@torch.no_grad()
def detect(
    model: Any, processor: Any, path: Path, unnamed: Sequence[int] = UNNAMED
) -> dict[str, np.ndarray]:
    """Their detections on one picture, best first, those of unnamed slots left out."""
    with Image.open(path) as picture:
        size = [(picture.height, picture.width)]
        inputs = processor(images=picture.convert("RGB"), return_tensors="pt")
    outputs = model(**inputs)
    [found] = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=size)
    named = ~torch.isin(found["labels"], torch.tensor([*unnamed]))
    order = found["scores"][named].argsort(descending=True, stable=True)
    return {key: value[named][order].numpy() for key, value in found.items()}


def assert_same(ours: Detections, theirs: dict[str, np.ndarray], size: tuple[int, int]) -> None:
    """Every detection of theirs is one of ours, at the same place of the order."""
    count = len(theirs["scores"])
    assert len(ours) >= count > 5
    np.testing.assert_allclose(ours.scores[:count], theirs["scores"], atol=2e-5)
    height, width = size
    boxes = theirs["boxes"].clip(0, [width, height, width, height])
    for index in range(count):
        # Rounding may swap neighbours whose scores are equal to five digits.
        near = np.abs(ours.scores - theirs["scores"][index]) < 4e-5
        same = near & (ours.labels == theirs["labels"][index])
        distance = np.abs(ours.boxes_xyxy[same] - boxes[index]).max(1)
        assert distance.size, index
        assert distance.min() < 5e-3, index


def test_detections_of_rt_detr_equal_hugging_faces(tmp_path: Path) -> None:
    """Stretched to a square, values in [0, 1]: what its image processor does by default."""
    torch.manual_seed(0)
    model = their_model(VARIANTS["like R18"])
    names = {slot: name for slot, name in NAMES.items()}
    model.config.id2label, model.config.label2id = names, {n: slot for slot, n in names.items()}
    processor = transformers.RTDetrImageProcessor(size={"height": 96, "width": 96})
    model.save_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    imported = import_weights(tmp_path / "theirs", tmp_path / "ours.safetensors")
    assert imported.preprocessing is not None
    assert imported.preprocessing["exact_size"] == [96, 96]
    predictor = load(tmp_path / "ours.safetensors", "cpu")
    for path, size in zip(write_pictures(tmp_path), PICTURES, strict=True):
        [ours] = predictor.predict(path, threshold=0)
        assert_same(ours, detect(model, processor, path), size)


def write_annotations(folder: Path, found: list[dict[str, np.ndarray]]) -> str:
    """Objects a few pixels from what was found: something that random weights detect."""
    generator = np.random.default_rng(1)
    objects: list[dict[str, Any]] = []
    for image, theirs in enumerate(found):
        for index in generator.permutation(len(theirs["scores"]))[:6]:
            left, top, right, bottom = theirs["boxes"][index] + generator.uniform(-2, 2, 4)
            sides = [float(max(right - left, 8)), float(max(bottom - top, 8))]
            box = [float(left), float(top), *sides]
            label = int(theirs["labels"][index])
            entry = {"image_id": image, "category_id": label, "bbox": box, "iscrowd": 0}
            objects.append({"id": len(objects) + 1, "area": sides[0] * sides[1], **entry})
    images = [
        {"id": image, "file_name": f"{image}.png", "height": height, "width": width}
        for image, (height, width) in enumerate(PICTURES)
    ]
    named = [{"id": slot, "name": name} for slot, name in NAMES.items() if name != "N/A"]
    content = {"images": images, "annotations": objects, "categories": named}
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return str(path)


def coco_numbers(annotations: str, found: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """What pycocotools says about their detections."""
    rows = [
        [image, *box[:2], *(box[2:] - box[:2]), score, label]
        for image, theirs in enumerate(found)
        for box, score, label in zip(
            theirs["boxes"], theirs["scores"], theirs["labels"], strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        evaluation = COCOeval(truth, truth.loadRes(np.array(rows, dtype=np.float64)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("mAP", "AP50", "AP75"), evaluation.stats.tolist(), strict=False))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_detections_and_their_average_precision_equal_hugging_faces(
    kind: Kind, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, target = tmp_path / "theirs", tmp_path / "ours.safetensors"
    shards = {"max_shard_size": "20MB"} if kind.name == "detr" else {}
    model, processor = save_theirs(folder, kind, **shards)
    assert len(list(folder.glob("*.safetensors"))) == (3 if shards else 1)
    imported = import_weights(folder, target)
    assert imported.categories == ("person", "bicycle", "motorcycle", "bus", "train")
    predictor = load(target, "cpu")
    found = []
    for path, size in zip(write_pictures(tmp_path), PICTURES, strict=True):
        [ours] = predictor.predict(path, threshold=0)
        found.append(detect(model, processor, path))
        if kind.name == "detr":  # one class for each query, whichever it is
            assert len(ours) == 11
        assert_same(ours, found[-1], size)
    annotations = write_annotations(tmp_path, found)
    options = ["--annotations", annotations, "--images", str(tmp_path), "--workers", "0"]
    assert main(["evaluate", str(target), *options, "--batch-size", "1", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    expected = coco_numbers(annotations, found)
    assert expected["mAP"] > 0.02
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-6), name
