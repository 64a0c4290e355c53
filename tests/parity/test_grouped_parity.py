"""LW-DETR and RF-DETR against transformers' with the same random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from test_criterion_parity import as_targets, random_labels
from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.detectors.imports.grouped import unread
from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.imports.layouts import rename
from d3etr.detectors.vit import WindowedViT
from d3etr.distiller import Distiller
from d3etr.structures import ImageBatch

transformers = pytest.importorskip("transformers")

CLASSES = 7
DINOV2 = {
    "model_type": "rf_detr_dinov2",
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_register_tokens": 0,
    "patch_size": 8,
    "image_size": 40,
}
PLAIN = {
    "model_type": "lw_detr_vit",
    "hidden_size": 24,
    "num_attention_heads": 3,
    "patch_size": 8,
    "image_size": 96,
    "pretrain_image_size": 40,
    "num_windows": 4,
}


@dataclass(frozen=True)
class Variant:
    """One of their models and what it is called here.

    Attributes:
        name: ours of the detector.
        backbone: of their backbone's configuration.
        options: of their configuration.
        vit: of our backbone's configuration.
        ours: of our configuration.
    """

    name: str
    backbone: Mapping[str, Any]
    vit: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)


_RF_VIT = {"width": 24, "heads": 3, "patch": 8, "positions": 5}
_LW_VIT = {"kind": "lw_detr", **_RF_VIT, "windows": 2}
VARIANTS = {
    "rf_detr": Variant(
        "rf_detr",
        {**DINOV2, "num_hidden_layers": 5, "num_windows": 2, "out_indices": [2, 5]},
        {**_RF_VIT, "blocks": 5, "windows": 2, "whole": [2], "outputs": [2, 5]},
    ),
    "rf_detr, wide, a block that nothing reads": Variant(
        "rf_detr",
        {**DINOV2, "num_hidden_layers": 4, "num_windows": 3, "out_indices": [1, 3]},
        {**_RF_VIT, "blocks": 3, "windows": 3, "whole": [1], "outputs": [1, 3]},
        {"d_model": 64, "c2f_num_blocks": 2, "hidden_expansion": 0.25, "decoder_n_points": 4},
        {"width": 64, "projector_blocks": 2, "expansion": 0.25, "points": 4},
    ),
    "rf_detr, one window": Variant(
        "rf_detr",
        {**DINOV2, "num_hidden_layers": 2, "num_windows": 1, "out_indices": [1, 2]},
        {**_RF_VIT, "blocks": 2, "windows": 1, "whole": [], "outputs": [1, 2]},
    ),
    "lw_detr": Variant(
        "lw_detr",
        {
            **PLAIN,
            "num_hidden_layers": 4,
            "window_block_indices": [0, 2],
            "out_indices": [2, 4],
        },
        {**_LW_VIT, "blocks": 4, "whole": [1, 3], "outputs": [2, 4]},
        {"projector_scale_factors": [1.0]},
    ),
    "lw_detr, wide, three levels": Variant(
        "lw_detr",
        {
            **PLAIN,
            "num_hidden_layers": 3,
            "window_block_indices": [0, 1],
            "out_indices": [1, 3],
        },
        {**_LW_VIT, "blocks": 3, "whole": [2], "outputs": [1, 3]},
        {"projector_scale_factors": [2.0, 1.0, 0.5], "d_model": 64},
        {"scales": [2.0, 1.0, 0.5], "width": 64},
    ),
}
"""In two widths each; images of 48 pixels have other grids than position embeddings."""


def their_model(variant: Variant) -> Any:
    """With random weights, in evaluation mode."""
    kind = {"rf_detr": "RfDetr", "lw_detr": "LwDetr"}[variant.name]
    options = {
        "d_model": 32,
        "decoder_n_points": 2,
        "decoder_layers": 3,
        "decoder_ffn_dim": 40,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 8,
        "num_queries": 9,
        "group_detr": 3,
        "dropout": 0.0,
        **variant.options,
    }
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=dict(variant.backbone),
        num_labels=CLASSES,
        attn_implementation="eager",
        **options,
    )
    model = getattr(transformers, f"{kind}ForObjectDetection")(config).eval()
    for name, tensor in model.state_dict().items():
        _randomise(name, tensor)
    return model


@torch.no_grad()
def _randomise(name: str, tensor: Tensor) -> None:
    """Weights by which every part matters and nothing saturates."""
    if name.endswith("running_var"):
        tensor.uniform_(0.5, 2)
    elif "reference_point_embed" in name:
        tensor.normal_(std=1.2)  # proposals are small: some boxes shall reach beyond the picture
    elif tensor.dim() > 1:
        tensor.normal_(std=tensor[0].numel() ** -0.5)
    elif name.endswith("weight") or "gamma" in name or "lambda" in name:
        tensor.uniform_(0.5, 1.5)
    elif tensor.is_floating_point():
        tensor.add_(0.05 * torch.randn_like(tensor))


def our_tensors(variant: Variant, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By our names, without those of blocks that nothing reads."""
    found = rename(tensors, variant.name)
    for name in unread(found, variant.vit["blocks"]):
        del found[name]
    return found


def our_detector(variant: Variant, model: nn.Module, **changes: Any) -> DetectionTransformer:
    """With their weights, in evaluation mode."""
    settings = {
        "name": variant.name,
        "backbone": {"name": "vit", "vit": dict(variant.vit)},
        "width": 32,
        "heads": 4,
        "cross_heads": 8,
        "feedforward": 40,
        "queries": 9,
        "groups": 3,
        "decoder_layers": 3,
        **variant.ours,
        **changes,
    }
    detector = build_detector(DetectorConfig.parse(settings), CLASSES).eval()
    detector.load_state_dict(our_tensors(variant, model.state_dict()), strict=True)
    return detector


def padded(images: int, side: int) -> ImageBatch:
    """The second one is padded on both sides."""
    pixels, padding = torch.randn(images, 3, side, side), torch.zeros(images, side, side).bool()
    padding[1, side // 2 + 3 :], padding[1, :, side - 11 :] = True, True
    return ImageBatch(pixels.masked_fill(padding[:, None], 0), padding)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_features_equal_theirs(variant: Variant) -> None:
    torch.manual_seed(0)
    model = their_model(variant)
    detector = our_detector(variant, model)
    pixels = torch.randn(2, 3, 48, 48)
    backbone = detector.backbone
    assert isinstance(backbone, WindowedViT)
    for ours, theirs in zip(
        backbone.maps(pixels), model.model.backbone.backbone(pixels).feature_maps, strict=True
    ):
        assert_close(ours, theirs, 2e-5)
        assert theirs.std(0).mean() > 0.1
    memory = detector.encode(ImageBatch(pixels))
    theirs = model.model.backbone(pixels, torch.ones(2, 48, 48))
    maps = [theirs[0]] if variant.name == "rf_detr" else [part for part, _ in theirs]
    assert memory.levels == tuple(part.shape[-2:] for part in maps)
    assert_close(memory.tokens, torch.cat([part.flatten(2).mT for part in maps], 1), 2e-5)


@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_every_layer_and_the_selection_equal_theirs(variant: Variant, with_padding: bool) -> None:
    torch.manual_seed(0)
    model = their_model(variant)
    detector = our_detector(variant, model)
    images = padded(3, 48) if with_padding else ImageBatch(torch.randn(3, 3, 48, 48))
    mask = None if images.padding is None else ~images.padding
    theirs = model(images.pixels, pixel_mask=mask)
    memory = detector.encode(images)
    queries = detector.object_queries(memory)
    [ours] = detector.decode(memory, [queries])
    states = theirs.intermediate_hidden_states
    assert_close(ours.logits, model.class_embed(states))
    assert_close(ours.logits[-1], theirs.logits)
    assert_close(ours.boxes_cxcywh[-1], theirs.pred_boxes)
    assert memory.proposals is not None and queries.reference_boxes is not None
    assert_close(memory.proposals.logits[0], theirs.enc_outputs_class)
    assert_close(memory.proposals.boxes_cxcywh[0], theirs.enc_outputs_coord_logits)
    assert_close(queries.reference_boxes, theirs.init_reference_points)
    # The comparison would say little if layers, images or queries were alike.
    for dimension in range(3):
        assert ours.logits.std(dimension).mean() > 0.02
    centre, half = ours.boxes_cxcywh[..., :2], ours.boxes_cxcywh[..., 2:] / 2
    assert (centre - half).min() < 0 and (centre + half).max() > 1  # beyond the picture


@pytest.mark.parametrize(("name", "side"), [("rf_detr", 40), ("lw_detr", 640)])
def test_folders_without_preprocessing_get_the_published_squares(
    name: str, side: int, tmp_path: Path
) -> None:
    """Of RF-DETR positions x patch; DETR's 800/1333 would detect something else."""
    their_model(VARIANTS[name]).save_pretrained(tmp_path / "theirs")
    imported = import_weights(tmp_path / "theirs", tmp_path / "ours.safetensors")
    assert imported.preprocessing is not None
    assert imported.preprocessing["exact_size"] == [side, side]
    assert imported.preprocessing["normalisation"] == "imagenet"
    assert any(f"assumed images of {side} x {side} pixels" in note for note in imported.notes)


@torch.no_grad()
def test_queries_have_the_places_of_the_best_tokens() -> None:
    torch.manual_seed(0)
    their = their_model(VARIANTS["rf_detr"])
    detector = our_detector(VARIANTS["rf_detr"], their)
    pixels = torch.randn(2, 3, 48, 48)
    memory = detector.encode(ImageBatch(pixels))
    tokens, model = memory.tokens, their.model
    states = model.enc_output_norm[0](model.enc_output[0](tokens))
    scores = model.enc_out_class_embed[0](states).amax(-1)
    place = detector.object_queries(memory).place
    assert place is not None
    assert torch.equal(place, scores.topk(9, dim=1).indices)


@pytest.mark.parametrize(
    ("variant", "counts"),
    [
        ("rf_detr", (3, 0, 6, 1)),
        ("rf_detr", (0, 0, 0, 0)),
        ("rf_detr, wide, a block that nothing reads", (2, 1)),
        ("lw_detr", (3, 0, 6, 1)),
        ("lw_detr, wide, three levels", (2, 1)),
    ],
)
def test_a_training_step_equals_theirs(variant: str, counts: tuple[int, ...]) -> None:
    """The loss over all groups of queries, and its gradient of every parameter."""
    torch.manual_seed(0)
    kind = VARIANTS[variant]
    model = their_model(kind)
    detector = our_detector(kind, model)
    images = ImageBatch(torch.randn(len(counts), 3, 48, 48))
    labels = random_labels(counts)
    targets = as_targets(labels)
    for network in (detector, model):
        network.train()
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
    criterion = SetCriterionConfig.model_validate({**detector.config.criterion_defaults})
    module = Distiller(detector, None, MethodConfig.parse({}), criterion, seed=0)
    losses = module(images, targets, None, module.normalisers(targets, None), step=3)
    ours = torch.stack(list(losses.values())).sum()
    theirs = model(images.pixels, labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours.backward()
    theirs.backward()
    gradients = {
        name: torch.zeros_like(x) if x.grad is None else x.grad
        for name, x in model.named_parameters()
    }
    expected = our_tensors(kind, gradients)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    names = dict(detector.named_parameters())
    assert names.keys() == expected.keys()
    for name, parameter in names.items():
        assert parameter.grad is not None, name
        error = (parameter.grad - expected[name]).abs().max().item()
        assert error <= 1e-5 * largest, name
