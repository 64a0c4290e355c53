"""Exported folders detect in transformers what they detect here, and come back unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_imported_detections import PICTURES, assert_same, detect, write_pictures
from torch import Tensor

from d3etr.cli.main import main
from d3etr.config.data import PreprocessingConfig
from d3etr.config.detector import DetectorConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.imports.layouts import UNUSED, rename
from d3etr.detectors.weights import WeightsInfo, load_weights, read_info, save_weights
from d3etr.inference import load
from d3etr.registry import DETECTORS
from d3etr.structures import ImageBatch

transformers = pytest.importorskip("transformers")

NAMES = ("person", "bicycle", "motorcycle", "bus", "train")
IDS = (1, 2, 4, 5, 6)
SIZES: dict[str, Any] = {
    "backbone": {"name": "resnet18"},
    "width": 32,
    "heads": 4,
    "feedforward": 48,
    "queries": 11,
    "encoder_layers": 1,
    "decoder_layers": 2,
}
DEFORMABLE = {"name": "deformable_detr", "points": 2}
RT_DETR = {
    "name": "rt_detr",
    "points": 2,
    "encoder_width": 24,
    "encoder_feedforward": 40,
    "expansion": 0.5,
}
KINDS: dict[str, dict[str, Any]] = {
    "detr": {"name": "detr", "classification": "softmax", "unused_outputs": 2},
    "detr-without-encoder": {"name": "detr", "classification": "softmax", "encoder_layers": 0},
    "conditional": {"name": "conditional_detr"},
    "conditional-dilated": {
        "name": "conditional_detr",
        "backbone": {"name": "resnet50", "dilation": True},
    },
    "dab": {"name": "dab_detr", "grid_temperature": 10.0},
    "deformable": {**DEFORMABLE, "levels": 4},
    "deformable-one-level": {**DEFORMABLE, "levels": 1},
    "deformable-refined": {**DEFORMABLE, "levels": 2, "box_refinement": True},
    "deformable-two-stage": {
        **DEFORMABLE,
        "levels": 3,
        "box_refinement": True,
        "two_stage": True,
    },
    "rt_detr": {**RT_DETR},
    "rt_detr-v2": {**RT_DETR, "levels": 2, "sampling": "discrete"},
}


@torch.no_grad()
def _randomise(detector: DetectionTransformer) -> None:
    """Weights large enough that queries, layers and images differ.

    Not too large where places are sampled: that blows rounding errors up.
    """
    spread = 0.5 if detector.config.sampling_parts else 1.0
    for name, tensor in detector.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.startswith(("query_", "anchors.", "position.level")):
            tensor.normal_()
        elif name == "projection.weight" or ("levels.projections" in name and tensor.dim() == 4):
            tensor.normal_(std=1e-3)  # features of a random ResNet are in the thousands
        elif tensor.dim() == 2:
            tensor.normal_(std=spread * tensor.shape[1] ** -0.5)
        elif tensor.is_floating_point():
            tensor.add_(0.05 * torch.randn_like(tensor))


def _weights(folder: Path, **architecture: Any) -> Path:
    """A file of random weights, of the classes ``NAMES``."""
    torch.manual_seed(1)
    config = DetectorConfig.parse({**SIZES, **architecture})
    detector = build_detector(config, len(NAMES)).eval()
    _randomise(detector)
    info = WeightsInfo(
        detector=config,
        categories=tuple(zip(IDS, NAMES, strict=True)),
        preprocessing=PreprocessingConfig(shortest_side=96, longest_side=200),
    )
    save_weights(folder / "weights.safetensors", detector, info)
    return folder / "weights.safetensors"


def _export(weights: Path) -> Path:
    folder = weights.parent / "exported"
    assert main(["export", str(weights), str(folder), "--format", "hugging-face"]) == 0
    return folder


def _batch(padded: bool) -> ImageBatch:
    pixels = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    if not padded:
        return ImageBatch(pixels)
    padding = torch.zeros(2, 96, 128, dtype=torch.bool)
    padding[0, 70:], padding[1, :, 90:] = True, True
    return ImageBatch(pixels.masked_fill(padding[:, None], 0.0), padding)


@torch.no_grad()
def _assert_equal_outputs(ours: DetectionTransformer, model: Any, softmax: bool) -> None:
    # Their RT-DETR does not look at the mask.
    images = _batch(padded=not model.config.model_type.startswith("rt_detr"))
    visible = torch.ones_like(images.pixels[:, 0], dtype=torch.long)
    if images.padding is not None:
        visible[images.padding] = 0
    expected = model(images.pixels, visible)
    memory = ours.encode(images)
    [outputs] = ours.decode(memory, [ours.object_queries(memory)])
    logits = expected.logits
    if softmax:
        slots = [slot for slot, name in model.config.id2label.items() if name != "N/A"]
        logits = logits.double().softmax(-1)[..., slots].logit().float()
    torch.testing.assert_close(outputs.logits[-1], logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.boxes_cxcywh[-1], expected.pred_boxes, atol=1e-4, rtol=0)
    assert outputs.logits[-1].std(1).mean() > 1e-3


def _detect(model: Any, processor: Any, path: Path) -> dict[str, Any]:
    """Their detections on one picture, labels by the ids of ``IDS``."""
    names = model.config.id2label
    unnamed = [slot for slot, name in names.items() if name == "N/A"]
    found = detect(model, processor, path, unnamed)
    ids = dict(zip(NAMES, IDS, strict=True))
    found["labels"] = np.array([ids[names[slot]] for slot in found["labels"].tolist()])
    return found


def test_every_detector_is_exported() -> None:
    assert {kind["name"] for kind in KINDS.values()} == {*DETECTORS.built_in}


def _assert_comes_back(folder: Path, weights: Path, box_refinement: bool) -> None:
    """Bit by bit, through the command's own import where it knows the kind of detector."""
    expected, info = load_file(weights), read_info(weights)
    if info.detector.name == "rt_detr":
        tensors = load_file(folder / "model.safetensors")
        found: dict[str, Tensor] = rename(tensors, "rt_detr", box_refinement=box_refinement)
        expected = {name: x for name, x in expected.items() if not name.endswith(UNUSED)}
    else:
        target = folder.parent / "again.safetensors"
        imported = import_weights(folder, target)
        assert imported.categories == NAMES
        again = read_info(target)
        assert again.preprocessing == info.preprocessing
        assert again.detector == info.detector
        if again.detector.softmax_classes and info.detector.unused_outputs:
            assert again.categories == info.categories
        found = load_file(target)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_exported_folders_detect_the_same_and_come_back(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = _weights(tmp_path, **KINDS[kind])
    folder = _export(weights)
    files = "config.json, model.safetensors, preprocessor_config.json"
    assert {file.name for file in folder.iterdir()} == {*files.split(", ")}
    assert capsys.readouterr().out.endswith(f" MB in {files}\n")
    model, loading = transformers.AutoModelForObjectDetection.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(loading.values())
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    ours, info = load_weights(weights)
    _assert_equal_outputs(ours, model.eval(), info.detector.softmax_classes)
    predictor = load(weights, "cpu")
    path, (height, width) = write_pictures(tmp_path)[0], PICTURES[0]
    if info.detector.name == "rt_detr":  # theirs takes multiples of 32 only
        width -= width % 32
        with Image.open(path) as picture:
            picture.crop((0, 0, width, height)).save(path)
    [found] = predictor.predict(path, threshold=0)
    assert_same(found, _detect(model, processor, path), (height, width))
    _assert_comes_back(folder, weights, KINDS[kind].get("box_refinement", False))
