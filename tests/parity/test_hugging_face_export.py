"""Exported folders detect in transformers what they detect here, and come back unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_imported_detections import PICTURES, assert_same, detect, write_pictures

from d3etr.cli.main import main
from d3etr.config.backbone import BackboneConfig
from d3etr.config.data import PreprocessingConfig
from d3etr.config.detector import DetectorConfig
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.detectors.exports.backbones import describe_backbone
from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.imports.layouts import rename_backbone
from d3etr.detectors.timm_weights import INNER
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
D_FINE = {
    "name": "d_fine",
    "backbone": {"name": "timm/hgnetv2_b0"},
    "encoder_width": 32,
    "encoder_feedforward": 40,
    "bins": 8,
}
DEIMV2 = {
    **D_FINE,
    "name": "deimv2",
    "levels": 2,
    "points": (4, 2),
    "encoder_blocks": 2,
    "fusion": "elan4",
    "implementation": "transformers",
}
DINOV3 = {
    **{"width": 32, "blocks": 4, "heads": 2, "inner": 40, "outputs": (1, 3, 4), "detail": 6},
}
LITE = {
    **DEIMV2,
    "encoder": "lite",
    "encoder_layers": 0,
    "encoder_feedforward": 1024,
    "gateway": False,
    "shared_box_head": True,
}
PLAIN_VIT = {
    "kind": "lw_detr",
    "width": 24,
    "blocks": 3,
    "heads": 3,
    "patch": 8,
    "whole": [1],
    "outputs": [1, 3],
    "positions": 5,
}
DINOV2 = {**PLAIN_VIT, "kind": "dinov2"}
LW_DETR = {
    "name": "lw_detr",
    "encoder_layers": 0,
    "cross_heads": 8,
    "projector_blocks": 2,
    "groups": 2,
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
    "rt_detr": {**RT_DETR, "backbone": {"name": "resnet18vd"}},
    "rt_detr-resnet50vd": {
        **RT_DETR,
        "backbone": {"name": "resnet50vd"},
        "denoising": {"queries": 20, "label_noise": 0.3, "box_noise": 0.5},
    },
    "rt_detr-over-hgnet": {**RT_DETR, "backbone": {"name": "timm/hgnetv2_b1"}, "levels": 2},
    "rt_detr-v2": {
        **RT_DETR,
        "backbone": {"name": "resnet18vd"},
        "levels": 2,
        "sampling": "discrete",
        "denoising": {"queries": 0},
    },
    "d_fine": {**D_FINE, "encoder_blocks": 1, "expansion": 0.5},
    "d_fine-two-levels": {
        **D_FINE,
        "levels": 2,
        "points": (6, 6),
        "encoder_blocks": 2,
        "denoising": {"queries": 0},
    },
    "d_fine-wider-encoder": {
        **D_FINE,
        "backbone": {"name": "timm/hgnetv2_b4"},
        "encoder_width": 48,
        "points": (2, 2, 2),
        "bound": 0.3,
        "curvature": 7.5,
    },
    "deimv2": DEIMV2,
    "deimv2-elan5": {
        **DEIMV2,
        "levels": 3,
        "points": (3, 6, 3),
        "fusion": "elan5",
        "activation": "relu",
        "encoder_width": 48,
    },
    "deimv2-over-resnet": {**DEIMV2, "backbone": {"name": "resnet18vd"}, "gateway": False},
    "deimv2-dinov3": {
        **DEIMV2,
        "levels": 3,
        "points": (2, 4, 2),
        "fusion": "elan5",
        "backbone": {
            "name": "dinov3",
            "dinov3": {**DINOV3, "registers": 3, "feedforward": "silu_gated"},
        },
    },
    "deimv2-dinov3-without-registers": {
        **DEIMV2,
        "levels": 3,
        "points": (2, 2, 2),
        "encoder_width": 48,
        "backbone": {
            "name": "dinov3",
            "dinov3": {
                **DINOV3,
                **{"registers": 0, "key_bias": False, "normed": "last"},
                **{"epsilon": 1e-6, "first_scale": 1.0},
            },
        },
    },
    "deimv2-atto": {**LITE, "backbone": {"name": "timm/hgnetv2_atto"}},
    "deimv2-femto": {
        **LITE,
        "backbone": {"name": "timm/hgnetv2_femto"},
        "denoising": {"queries": 0},
        "bound": 0.3,
    },
    "deimv2-pico": {
        **LITE,
        "backbone": {"name": "timm/hgnetv2_pico"},
        "gateway": True,
        "shared_box_head": False,
    },
    "lw_detr": {**LW_DETR, "backbone": {"name": "vit", "vit": PLAIN_VIT}},
    "lw_detr-three-levels": {
        **LW_DETR,
        "backbone": {"name": "vit", "vit": {**PLAIN_VIT, "windows": 1, "whole": []}},
        "scales": [2.0, 1.0, 0.5],
        "width": 48,
    },
    "rf_detr": {**LW_DETR, "name": "rf_detr", "backbone": {"name": "vit", "vit": DINOV2}},
    "rf_detr-wider": {
        **LW_DETR,
        "name": "rf_detr",
        "backbone": {"name": "vit", "vit": {**DINOV2, "windows": 3, "positions": 12}},
        "width": 48,
        "points": 4,
        "groups": 1,
    },
    "d_fine-over-resnet": {**D_FINE, "backbone": {"name": "resnet18vd"}, "points": (4, 2, 2)},
}
SELECTING, GROUPED = ("rt_detr", "d_fine", "deimv2"), ("lw_detr", "rf_detr")
BOUNDED = PreprocessingConfig(shortest_side=96, longest_side=200)
SQUARE = PreprocessingConfig(exact_size=(96, 96))
STRETCHED = PreprocessingConfig(exact_size=(96, 160), normalisation="unit")


@torch.no_grad()
def _randomise(detector: DetectionTransformer) -> None:
    """Weights large enough that queries, layers and images differ.

    Not too large, least of all where places are sampled: that blows rounding errors up.
    """
    spread = 0.5 if detector.config.sampling_parts else 0.75
    for name, tensor in detector.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.startswith(("query_", "anchors.", "position.level")):
            tensor.normal_()
        elif name == "projection.weight" or ("levels.projections" in name and tensor.dim() == 4):
            tensor.normal_(std=1e-3)  # features of a random ResNet are in the thousands
        elif name.endswith((".lab.scale", ".lab.bias")):
            tensor.add_(0.2 * torch.rand_like(tensor))
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
        preprocessing=SQUARE
        if config.name in GROUPED
        else STRETCHED
        if config.name in SELECTING
        else BOUNDED,
    )
    save_weights(folder / "weights.safetensors", detector, info)
    return folder / "weights.safetensors"


def _export(weights: Path) -> Path:
    folder = weights.parent / "exported"
    assert main(["export", str(weights), str(folder), "--format", "hugging-face"]) == 0
    return folder


def _batch(padded: bool, width: int = 128) -> ImageBatch:
    pixels = torch.randn(2, 3, 96, width, generator=torch.Generator().manual_seed(0))
    if not padded:
        return ImageBatch(pixels)
    padding = torch.zeros(2, 96, width, dtype=torch.bool)
    padding[0, 70:], padding[1, :, 90:] = True, True
    return ImageBatch(pixels.masked_fill(padding[:, None], 0.0), padding)


@torch.no_grad()
def _assert_equal_outputs(ours: DetectionTransformer, model: Any, softmax: bool) -> None:
    # Their RT-DETR and its kin do not look at the mask.
    kind = model.config.model_type
    images = _batch(not kind.startswith(SELECTING), 96 if kind in GROUPED else 128)
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
    unknown_there = {"dino"}  # tests/cli/test_export.py
    assert {kind["name"] for kind in KINDS.values()} == {*DETECTORS.built_in} - unknown_there


def _assert_comes_back(folder: Path, weights: Path) -> None:
    """Bit by bit, and the same architecture."""
    target = folder.parent / "again.safetensors"
    imported = import_weights(folder, target)
    assert imported.categories == NAMES
    info, again = read_info(weights), read_info(target)
    assert again.preprocessing == info.preprocessing
    assert again.detector == info.detector
    if again.detector.softmax_classes and info.detector.unused_outputs:
        assert again.categories == info.categories
    expected, found = load_file(weights), load_file(target)
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
    [found] = predictor.predict(path, threshold=0)
    assert_same(found, _detect(model, processor, path), (height, width))
    _assert_comes_back(folder, weights)


@pytest.mark.parametrize("size", [*(f"b{k}" for k in range(7)), "atto", "femto", "pico"])
def test_every_hgnet_has_the_right_sizes(size: str) -> None:
    name, stages = f"timm/hgnetv2_{size}.some_weights", 3 if size.startswith("b") else 2
    settings = describe_backbone(BackboneConfig(name=name), stages)
    assert settings.pop("model_type") == "hgnet_v2"
    with torch.device("meta"):
        network = transformers.HGNetV2Backbone(transformers.HGNetV2Config(**settings))
        ours = build_backbone(BackboneConfig(name=f"timm/hgnetv2_{size}"))
    found = {n: x.shape for n, x in rename_backbone(network.state_dict()).items()}
    expected = {n.removeprefix(INNER): x.shape for n, x in ours.state_dict().items()}
    counters = {name for name in found if name.endswith("num_batches_tracked")}
    assert {n: x for n, x in found.items() if n not in counters} == expected
    assert network.channels == [*ours.stage_channels[1:]]
