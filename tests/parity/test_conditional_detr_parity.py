"""Conditional DETR against Hugging Face's implementation with the same random weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from d3etr.config.detector import BackboneConfig, DetectorConfig
from d3etr.detectors.build import build_detector
from d3etr.detectors.conditional_detr import ConditionalDETR
from d3etr.structures import DecoderOutputs, ImageBatch

transformers = pytest.importorskip("transformers")
from hugging_face_weights import from_hugging_face  # noqa: E402

CLASSES = 7
SIZES = {"width": 32, "heads": 4, "feedforward": 48, "queries": 11}
IMAGES = ((96, 160), (128, 70), (33, 128))
"""(height, width) of the images of one batch: each is padded differently."""


def _hugging_face(layer_type: str, depths: list[int], hidden: list[int]) -> nn.Module:
    config = transformers.ConditionalDetrConfig(
        backbone_config=transformers.ResNetConfig(
            depths=depths, hidden_sizes=hidden, layer_type=layer_type, out_features=["stage4"]
        ),
        num_queries=SIZES["queries"],
        d_model=SIZES["width"],
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=SIZES["feedforward"],
        decoder_ffn_dim=SIZES["feedforward"],
        encoder_attention_heads=SIZES["heads"],
        decoder_attention_heads=SIZES["heads"],
        num_labels=CLASSES,
        attn_implementation="eager",
    )
    model = transformers.ConditionalDetrForObjectDetection(config).eval()
    for name, tensor in model.state_dict().items():
        _randomise(name, tensor)
    return model


@torch.no_grad()
def _randomise(name: str, tensor: Tensor) -> None:
    """Weights large enough that queries, layers and images differ."""
    if name.endswith("running_var"):
        tensor.uniform_(0.5, 2)
    elif name.endswith("query_position_embeddings.weight"):
        tensor.normal_()
    elif name.endswith("input_projection.weight"):
        tensor.mul_(1e-3)  # features of a random ResNet are in the thousands
    elif tensor.dim() == 2:
        tensor.normal_(std=tensor.shape[1] ** -0.5)
    else:
        tensor.add_(0.05 * torch.randn_like(tensor))


def _ours(theirs: nn.Module, backbone: str) -> ConditionalDETR:
    config = DetectorConfig(
        backbone=BackboneConfig(name=backbone), encoder_layers=2, decoder_layers=3, **SIZES
    )
    detector = build_detector(config, CLASSES).eval()
    detector.load_state_dict(from_hugging_face(theirs.state_dict()), strict=True)
    return detector


def _batch(padded: bool) -> ImageBatch:
    height, width = (max(sides) for sides in zip(*IMAGES, strict=True))
    if not padded:
        return ImageBatch(torch.randn(len(IMAGES), 3, height, width))
    pixels = torch.zeros(len(IMAGES), 3, height, width)
    padding = torch.ones(len(IMAGES), height, width, dtype=torch.bool)
    for index, (h, w) in enumerate(IMAGES):
        pixels[index, :, :h, :w] = torch.randn(3, h, w)
        padding[index, :h, :w] = False
    return ImageBatch(pixels, padding)


def _run_theirs(model: nn.Module, images: ImageBatch) -> dict[str, Tensor]:
    """Logits and boxes of every layer (theirs returns the last one's), and the maps."""
    states: list[Tensor] = []
    for layer in model.model.decoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: states.append(output))
    mask = None if images.padding is None else (~images.padding).long()
    outputs = model(images.pixels, mask, output_attentions=True)
    hidden = model.model.decoder.layernorm(torch.stack(states))
    queries = model.model.query_position_embeddings.weight
    offsets = model.bbox_predictor(hidden)
    offsets[..., :2] += model.model.decoder.ref_point_head(queries)
    logits, boxes = model.class_labels_classifier(hidden), offsets.sigmoid()
    torch.testing.assert_close(logits[-1], outputs.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(boxes[-1], outputs.pred_boxes, atol=1e-5, rtol=0)
    return {
        "logits": logits,
        "boxes": boxes,
        "self": torch.stack(outputs.decoder_attentions),
        "cross": torch.stack(outputs.cross_attentions),
    }


def _assert_equal(ours: DecoderOutputs, theirs: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours.logits, theirs["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.boxes_cxcywh, theirs["boxes"], atol=1e-4, rtol=0)
    if ours.self_attention_scores is not None:
        torch.testing.assert_close(ours.self_attention, theirs["self"], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.cross_attention, theirs["cross"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_every_layer_equals_hugging_face(padded: bool) -> None:
    torch.manual_seed(0)
    theirs = _hugging_face("basic", [2, 2, 2, 2], [64, 128, 256, 512])
    detector = _ours(theirs, "resnet18")
    images = _batch(padded)
    expected = _run_theirs(theirs, images)
    memory = detector.encode(images)
    for attention in (True, False):
        (outputs,) = detector.decode(memory, [detector.object_queries()], attention=attention)
        _assert_equal(outputs, expected)


@torch.no_grad()
def test_outputs_differ_between_images_and_layers() -> None:
    """The comparison above would say little if everything were alike."""
    torch.manual_seed(0)
    theirs = _hugging_face("basic", [2, 2, 2, 2], [64, 128, 256, 512])
    expected = _run_theirs(theirs, _batch(padded=True))
    for dimension, least in enumerate((0.2, 0.05, 0.01)):  # layers, images, queries
        assert expected["logits"].std(dimension).mean() > least
        assert expected["boxes"].std(dimension).mean() > 0.01
    assert expected["self"].std(-1).mean() > 0.05
    assert expected["cross"].std(-1).mean() > 0.03


@torch.no_grad()
def test_bottleneck_features_equal_hugging_face() -> None:
    torch.manual_seed(0)
    theirs = _hugging_face("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048])
    detector = _ours(theirs, "resnet50")
    pixels = torch.randn(1, 3, 64, 96)
    expected = theirs.model.backbone.model(pixels).feature_maps[-1]
    scale = expected.abs().max()
    torch.testing.assert_close(detector.backbone(pixels) / scale, expected / scale)
