"""RT-DETR and RT-DETRv2 against transformers' with the same random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_criterion_parity import as_targets, random_labels
from test_denoising_parity import same_noise as same_noise
from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.detectors.denoising import DenoisingNoise, draw_noise
from d3etr.detectors.imports.layouts import rename
from d3etr.distiller import Distiller
from d3etr.structures import ImageBatch

transformers = pytest.importorskip("transformers")

CLASSES = 7
SIZES: Mapping[str, Any] = {"heads": 4, "feedforward": 48, "queries": 11, "decoder_layers": 3}
BASIC = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
BOTTLENECK = {
    "layer_type": "bottleneck",
    "depths": [3, 4, 6, 3],
    "hidden_sizes": [256, 512, 1024, 2048],
}


@dataclass(frozen=True)
class Variant:
    """One of their models and what it is called here.

    Attributes:
        theirs: ``RTDetr`` or ``RTDetrV2``.
        backbone: our backbone.
        network: of their backbone's configuration.
        options: of their configuration.
        ours: of our configuration.
    """

    theirs: str = "RTDetr"
    backbone: str = "resnet18vd"
    network: Mapping[str, Any] = field(default_factory=lambda: BASIC)
    options: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)


SMALL = {"encoder_width": 32, "width": 32, "encoder_feedforward": 40}
# Not compared: learned contents, where transformers 5.23 fails ('Embedding' has no 'tile').
VARIANTS = {
    "like R18": Variant(ours={**SMALL, "expansion": 0.5}, options={"hidden_expansion": 0.5}),
    "like R101: the encoder is wider": Variant(
        backbone="resnet50vd",
        network=BOTTLENECK,
        ours={"encoder_width": 48, "width": 32, "encoder_feedforward": 56, "points": 3},
        options={"decoder_n_points": 3},
    ),
    "v2": Variant("RTDetrV2", ours={**SMALL, "points": 2}, options={"decoder_n_points": 2}),
    "v2, discrete": Variant(
        "RTDetrV2",
        ours={**SMALL, "sampling": "discrete"},
        options={"decoder_method": "discrete"},
    ),
}


def their_model(variant: Variant) -> Any:
    """With random weights, in evaluation mode."""
    ours = variant.ours
    config = getattr(transformers, f"{variant.theirs}Config")(
        backbone_config=transformers.RTDetrResNetConfig(
            out_features=["stage2", "stage3", "stage4"], embedding_size=64, **variant.network
        ),
        encoder_in_channels=list(variant.network["hidden_sizes"][1:]),
        encoder_hidden_dim=ours["encoder_width"],
        encoder_ffn_dim=ours["encoder_feedforward"],
        encoder_attention_heads=SIZES["heads"],
        d_model=ours["width"],
        decoder_in_channels=[ours["encoder_width"]] * 3,
        decoder_ffn_dim=SIZES["feedforward"],
        decoder_layers=SIZES["decoder_layers"],
        decoder_attention_heads=SIZES["heads"],
        num_queries=SIZES["queries"],
        num_denoising=10,
        num_labels=CLASSES,
        attn_implementation="eager",
        **variant.options,
    )
    model = getattr(transformers, f"{variant.theirs}ForObjectDetection")(config).eval()
    for name, tensor in model.state_dict().items():
        _randomise(name, tensor)
    return model


@torch.no_grad()
def _randomise(name: str, tensor: Tensor) -> None:
    """Weights by which every part matters and nothing saturates."""
    if name.endswith("running_var"):
        tensor.uniform_(0.5, 2)
    elif tensor.dim() > 1:
        tensor.normal_(std=tensor[0].numel() ** -0.5)
        if "denoising_class_embed" in name:
            tensor[-1] = 0.0
    elif name.endswith("weight"):
        tensor.uniform_(0.5, 1.5)
    elif tensor.is_floating_point() and "n_points_scale" not in name:
        tensor.add_(0.05 * torch.randn_like(tensor))


def our_detector(variant: Variant, model: nn.Module, **changes: Any) -> DetectionTransformer:
    """With their weights, in evaluation mode."""
    settings = {"name": "rt_detr", "backbone": {"name": variant.backbone}, **SIZES, **variant.ours}
    settings |= {"denoising": {"queries": 10}, **changes}
    detector = build_detector(DetectorConfig.parse(settings), CLASSES).eval()
    detector.load_state_dict(rename(model.state_dict(), "rt_detr"), strict=True)
    return detector


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("size", [(96, 128), (64, 64)])
@torch.no_grad()
def test_every_layer_and_the_selection_equal_theirs(
    variant: Variant, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    model = their_model(variant)
    detector = our_detector(variant, model)
    pixels = torch.randn(2, 3, *size)
    theirs = model(pixels)
    memory = detector.encode(ImageBatch(pixels))
    queries = detector.object_queries(memory)
    [ours] = detector.decode(memory, [queries])
    assert_close(ours.logits.transpose(0, 1), theirs.intermediate_logits)
    assert_close(ours.boxes_cxcywh.transpose(0, 1), theirs.intermediate_reference_points, 1e-5)
    assert memory.proposals is not None and queries.reference_logits is not None
    assert_close(memory.proposals.logits[0], theirs.enc_topk_logits)
    assert_close(memory.proposals.boxes_cxcywh[0], theirs.enc_topk_bboxes, 1e-5)
    assert_close(queries.reference_logits, theirs.init_reference_points)
    # The comparison would say little if layers, images or queries were alike.
    for dimension in range(3):
        assert theirs.intermediate_logits.std(dimension).mean() > 0.02


@torch.no_grad()
def test_queries_have_the_places_of_the_best_tokens() -> None:
    torch.manual_seed(0)
    variant = VARIANTS["like R18"]
    model = their_model(variant)
    detector = our_detector(variant, model)
    pixels = torch.randn(2, 3, 96, 128)
    scores = model(pixels).enc_outputs_class.amax(-1)
    place = detector.object_queries(detector.encode(ImageBatch(pixels))).place
    assert place is not None
    assert torch.equal(place, scores.topk(SIZES["queries"], dim=1).indices)


@pytest.mark.parametrize(
    ("variant", "counts", "trained", "tolerance"),
    [
        ("like R18", (3, 0, 6, 1), False, 1e-5),
        ("like R18", (0, 0, 0, 0), False, 1e-5),
        ("v2", (3, 0, 6, 1), False, 1e-5),
        # Statistics of few random cells blow up rounding, which layouts of memory differ in.
        ("like R18", (3, 0, 6, 1), True, 1e-4),
    ],
)
def test_a_training_step_equals_theirs(
    variant: str,
    counts: tuple[int, ...],
    trained: bool,
    tolerance: float,
    same_noise: Callable[[DenoisingNoise], None],
) -> None:
    """The loss and its gradient of every parameter, denoising and batch statistics included."""
    torch.manual_seed(0)
    model = their_model(VARIANTS[variant])
    # Look forward twice is the official code's; transformers has it not.
    detector = our_detector(VARIANTS[variant], model, look_forward_twice=False)
    images = ImageBatch(torch.randn(len(counts), 3, 64, 96))
    labels = random_labels(counts)
    targets = as_targets(labels)
    for network in (detector, model):
        network.train()
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d) and not trained:
                norm.eval()
    queries = 2 * max(counts) * (10 // max(1, *counts))
    same_noise(draw_noise(targets.image_ids, queries, CLASSES, seed=0, step=3))

    defaults = detector.config.criterion_defaults
    criterion = SetCriterionConfig.model_validate({**defaults})
    module = Distiller(detector, None, MethodConfig.parse({}), criterion, seed=0)
    losses = module(images, targets, None, module.normalisers(targets, None), step=3)
    ours = torch.stack(list(losses.values())).sum()
    theirs = model(images.pixels, labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours.backward()
    theirs.backward()
    expected = rename(
        {
            name: torch.zeros_like(x) if x.grad is None else x.grad
            for name, x in model.named_parameters()
        },
        "rt_detr",
    )
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    compared = 0
    for name, parameter in detector.named_parameters():
        if not name.startswith("backbone."):  # theirs keeps norms' weights frozen as buffers
            assert parameter.grad is not None, name
            error = (parameter.grad - expected[name]).abs().max().item()
            assert error <= tolerance * largest, name
            compared += 1
    assert compared == len([name for name in expected if not name.startswith("backbone.")])
    statistics = rename(model.state_dict(), "rt_detr")
    for name, buffer in detector.named_buffers():
        if name.startswith("encoder.") and "running" in name:
            torch.testing.assert_close(buffer, statistics[name], atol=1e-5, rtol=1e-5)
