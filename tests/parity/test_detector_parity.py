"""The family against Hugging Face's implementations with the same random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.detectors.imports.layouts import rename
from d3etr.registry import DETECTORS
from d3etr.structures import DecoderOutputs, ImageBatch

transformers = pytest.importorskip("transformers")
dab = pytest.importorskip("transformers.models.dab_detr.modeling_dab_detr")

CLASSES = 7
LAYERS = 3
SIZES = {"width": 32, "heads": 4, "feedforward": 48, "queries": 11}
IMAGES = ((96, 160), (128, 70), (33, 128))
"""(height, width) of the images of one batch: each is padded differently."""


@dataclass(frozen=True)
class Kind:
    """One of their models and what it is called here.

    Attributes:
        name: our detector.
        theirs: their class, without "ForObjectDetection" and "Config".
        options: of their configuration.
        ours: of our configuration.
        seed: of the weights. Of the two-stage detector's not every one will do: images would
            propose nothing but their padding.
    """

    name: str
    theirs: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


REFINED = {"with_box_refine": True}
KINDS = {
    "detr": Kind("detr", "Detr", ours={"classification": "softmax"}),
    "conditional_detr": Kind("conditional_detr", "ConditionalDetr"),
    "dab_detr": Kind("dab_detr", "DabDetr"),
    "deformable_detr": Kind("deformable_detr", "DeformableDetr"),
    "deformable-one-level": Kind(
        "deformable_detr", "DeformableDetr", {"num_feature_levels": 1}, {"levels": 1}
    ),
    "deformable-refined": Kind(
        "deformable_detr", "DeformableDetr", REFINED, {"box_refinement": True}
    ),
    "deformable-two-stage": Kind(
        "deformable_detr",
        "DeformableDetr",
        REFINED | {"two_stage": True, "two_stage_num_proposals": SIZES["queries"]},
        {"box_refinement": True, "two_stage": True},
        seed=1,
    ),
}


SPREAD = {"deformable_detr": 0.5}
"""Of weights, where wild ones blow rounding errors up: sampling depends on what was sampled."""


def _hugging_face(kind: Kind, layer_type: str = "basic") -> nn.Module:
    depths, hidden = [2, 2, 2, 2], [64, 128, 256, 512]
    stages = ["stage4"]
    if kind.name == "deformable_detr" and kind.options.get("num_feature_levels", 4) > 1:
        stages = ["stage2", "stage3", "stage4"]
    width = "hidden_size" if kind.name == "dab_detr" else "d_model"
    config = getattr(transformers, f"{kind.theirs}Config")(
        backbone_config=transformers.ResNetConfig(
            depths=depths, hidden_sizes=hidden, layer_type=layer_type, out_features=stages
        ),
        num_queries=SIZES["queries"],
        encoder_layers=2,
        decoder_layers=LAYERS,
        encoder_ffn_dim=SIZES["feedforward"],
        decoder_ffn_dim=SIZES["feedforward"],
        encoder_attention_heads=SIZES["heads"],
        decoder_attention_heads=SIZES["heads"],
        num_labels=CLASSES,
        attn_implementation="eager",
        **{width: SIZES["width"]},
        **kind.options,
    )
    model = getattr(transformers, f"{kind.theirs}ForObjectDetection")(config).eval()
    for name, tensor in model.state_dict().items():
        _randomise(name, tensor, SPREAD.get(kind.name, 1.0))
    if kind.name == "dab_detr":  # their refinement has a copy of the box head
        model.model.decoder.bbox_embed.load_state_dict(model.bbox_predictor.state_dict())
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def _randomise(name: str, tensor: Tensor, spread: float = 1.0) -> None:
    """Weights large enough that queries, layers and images differ."""
    if name.endswith("running_var"):
        tensor.uniform_(0.5, 2)
    elif name.endswith(("query_position_embeddings.weight", "query_refpoint_embeddings.weight")):
        tensor.normal_()
    elif name.endswith("level_embed"):
        tensor.normal_()
    elif "input_proj" in name and tensor.dim() == 4:
        tensor.mul_(1e-3)  # features of a random ResNet are in the thousands
    elif tensor.dim() == 2:
        tensor.normal_(std=spread * tensor.shape[1] ** -0.5)
    elif tensor.is_floating_point():
        tensor.add_(0.05 * torch.randn_like(tensor))


def _ours(kind: Kind, theirs: nn.Module) -> DetectionTransformer:
    config = DetectorConfig.parse(
        {
            "name": kind.name,
            "backbone": {"name": "resnet18"},
            "encoder_layers": 2,
            "decoder_layers": LAYERS,
            **SIZES,
            **kind.ours,
        }
    )
    detector = build_detector(config, CLASSES).eval()
    tensors = rename(
        theirs.state_dict(),
        kind.name,
        box_refinement=bool(kind.ours.get("box_refinement")),
    )
    detector.load_state_dict(tensors, strict=True)
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


def _inverse_sigmoid(x: Tensor) -> Tensor:
    return x.logit(eps=1e-5)


def _layers_of_detr(model: nn.Module, states: list[Tensor], outputs: Any) -> tuple[Tensor, Tensor]:
    hidden = model.model.decoder.layernorm(torch.stack(states))
    probabilities = model.class_labels_classifier(hidden).double().softmax(-1)[..., :-1]
    return probabilities.logit().float(), model.bbox_predictor(hidden).sigmoid()


def _layers_of_conditional(
    model: nn.Module, states: list[Tensor], outputs: Any
) -> tuple[Tensor, Tensor]:
    hidden = model.model.decoder.layernorm(torch.stack(states))
    queries = model.model.query_position_embeddings.weight
    offsets = model.bbox_predictor(hidden)
    offsets[..., :2] += _inverse_sigmoid(model.model.decoder.ref_point_head(queries).sigmoid())
    return model.class_labels_classifier(hidden), offsets.sigmoid()


def _layers_of_dab(model: nn.Module, states: list[Tensor], outputs: Any) -> tuple[Tensor, Tensor]:
    decoder = model.model.decoder
    anchors = model.model.query_refpoint_embeddings.weight
    boxes = []
    for state in states:
        anchors = _inverse_sigmoid(anchors.sigmoid())
        boxes.append((model.bbox_predictor(decoder.layernorm(state)) + anchors).sigmoid())
        anchors = decoder.bbox_embed(state) + anchors
    logits = model.class_embed(decoder.layernorm(torch.stack(states)))
    return logits, torch.stack(boxes)


def _layers_of_deformable(
    model: nn.Module, states: list[Tensor], outputs: Any
) -> tuple[Tensor, Tensor]:
    logits, boxes = [], []
    for index, state in enumerate(outputs.intermediate_hidden_states.unbind(1)):
        before = outputs.intermediate_reference_points[:, index - 1] if index else None
        reference = _inverse_sigmoid(outputs.init_reference_points if before is None else before)
        offsets = model.bbox_embed[index](state)
        offsets[..., : reference.shape[-1]] += reference
        logits.append(model.class_embed[index](state))
        boxes.append(offsets.sigmoid())
    return torch.stack(logits), torch.stack(boxes)


LAYERS_OF = {
    "detr": _layers_of_detr,
    "conditional_detr": _layers_of_conditional,
    "dab_detr": _layers_of_dab,
    "deformable_detr": _layers_of_deformable,
}


def _run_theirs(kind: Kind, model: nn.Module, images: ImageBatch) -> dict[str, Tensor]:
    """Logits and boxes of every layer (theirs returns the last one's), and the maps."""
    states: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in model.model.decoder.layers]
    mask = None if images.padding is None else (~images.padding).long()
    if mask is None and kind.name in ("dab_detr", "deformable_detr"):
        mask = torch.ones_like(images.pixels[:, 0], dtype=torch.long)
    outputs = model(images.pixels, mask, output_attentions=True)
    for hook in hooks:
        hook.remove()
    logits, boxes = LAYERS_OF[kind.name](model, states, outputs)
    if kind.name != "detr":
        torch.testing.assert_close(logits[-1], outputs.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(boxes[-1], outputs.pred_boxes, atol=1e-5, rtol=0)
    found = {"logits": logits, "boxes_cxcywh": boxes}
    found["self_attention"] = torch.stack(outputs.decoder_attentions)
    if kind.name != "deformable_detr":  # theirs are weights of samples, not maps
        found["cross_attention"] = torch.stack(outputs.cross_attentions)
    return found


TOLERANCES = {
    "logits": 1e-4,
    "boxes_cxcywh": 2e-5,
    "self_attention": 1e-5,
    "cross_attention": 1e-5,
}


def _assert_equal(ours: DecoderOutputs, theirs: dict[str, Tensor], names: list[str]) -> None:
    for name in names:
        torch.testing.assert_close(getattr(ours, name), theirs[name], atol=TOLERANCES[name], rtol=0)


def test_every_detector_is_compared() -> None:
    own_files = {
        "rt_detr",
        "d_fine",
        "deimv2",
        "lw_detr",
        "rf_detr",
        "dino",
    }  # test_rt_detr_parity.py and so on
    assert {kind.name for kind in KINDS.values()} | own_files == set(DETECTORS.names)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_every_layer_equals_hugging_face(kind: Kind, padded: bool) -> None:
    torch.manual_seed(kind.seed)
    theirs = _hugging_face(kind)
    detector = _ours(kind, theirs)
    images = _batch(padded)
    expected = _run_theirs(kind, theirs, images)
    memory = detector.encode(images)
    queries = [detector.object_queries(memory)]
    (outputs,) = detector.decode(memory, queries, attention=True)
    _assert_equal(outputs, expected, list(expected))
    (outputs,) = detector.decode(memory, queries)
    _assert_equal(outputs, expected, ["logits", "boxes_cxcywh"])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_outputs_differ_between_images_and_layers(kind: Kind) -> None:
    """The comparison above would say little if everything were alike."""
    torch.manual_seed(kind.seed)
    expected = _run_theirs(kind, _hugging_face(kind), _batch(padded=True))
    for dimension in range(3):  # layers, images, queries
        assert expected["logits"].std(dimension).mean() > 0.005
        assert expected["boxes_cxcywh"].std(dimension).mean() > 0.0003
    assert expected["self_attention"].std(-1).mean() > 0.005
    if "cross_attention" in expected:
        assert expected["cross_attention"].std(-1).mean() > 0.005


SATURATING = {
    "conditional_detr": "decoder.ref_point_head.layers.1.",
    "dab_detr": "query_refpoint_embeddings.",
    "deformable_detr": "reference_points.",
    "deformable-refined": "bbox_embed.0.layers.2.bias",
    "deformable-two-stage": f"bbox_embed.{LAYERS}.layers.2.bias",
}
"""What references come from; those of the refined detector, from its second layer on."""


@pytest.mark.parametrize(
    ("name", "epsilon"), [*((name, 1e-5) for name in SATURATING), ("dab_detr", 1e-3)]
)
@torch.no_grad()
def test_boxes_move_from_saturated_references_as_theirs_do(
    name: str, epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The official DAB-DETR differs from Hugging Face's in nothing but the epsilon."""
    kind, is_dab = KINDS[name], name == "dab_detr"
    if is_dab:
        monkeypatch.setattr(dab, "inverse_sigmoid", partial(dab.inverse_sigmoid, eps=epsilon))
        kind = replace(kind, ours={"inverse_sigmoid_epsilon": epsilon})
    torch.manual_seed(kind.seed)
    theirs = _hugging_face(kind)
    for parameter_name, parameter in theirs.named_parameters():
        if SATURATING[name] in parameter_name:
            far = torch.tensor([14.0, 0.0, -14.0, 0.0])
            parameter.add_(far) if "bbox" in parameter_name else parameter.mul_(20)
    detector = _ours(kind, theirs)
    images = _batch(padded=False)
    expected = theirs(images.pixels, torch.ones_like(images.pixels[:, 0], dtype=torch.long))
    memory = detector.encode(images)
    queries = detector.object_queries(memory)
    (outputs,) = detector.decode(memory, [queries])
    if name == "deformable-refined":
        start = outputs.boxes_cxcywh[0].logit()
    else:
        start = queries.reference_logits
    saturated = start.abs() > 12
    assert 0.05 < saturated.float().mean() < 0.95
    torch.testing.assert_close(outputs.boxes_cxcywh[-1], expected.pred_boxes, atol=5e-6, rtol=0)
    if kind.ours.get("two_stage"):  # what is passed on is neither rounded nor cut off
        best = expected.enc_outputs_class[..., 0].topk(SIZES["queries"], dim=1).indices
        passed = expected.enc_outputs_coord_logits.gather(1, best[..., None].expand(-1, -1, 4))
        torch.testing.assert_close(start, passed, atol=1e-4, rtol=0)
    if is_dab:  # the other epsilon would be seen
        other_epsilon = {"inverse_sigmoid_epsilon": 1e-3 if epsilon == 1e-5 else 1e-5}
        detector.config = detector.config.model_copy(update=other_epsilon)
        (other,) = detector.decode(memory, [queries])
        assert (other.boxes_cxcywh[-1] - expected.pred_boxes).abs().max() > 2e-3


@torch.no_grad()
def test_bottleneck_features_equal_hugging_face() -> None:
    torch.manual_seed(0)
    backbone = transformers.ResNetBackbone(
        transformers.ResNetConfig(
            depths=[3, 4, 6, 3],
            hidden_sizes=[256, 512, 1024, 2048],
            layer_type="bottleneck",
            out_features=["stage2", "stage3", "stage4"],
        )
    ).eval()
    for name, tensor in backbone.state_dict().items():
        _randomise(name, tensor)
    state = {f"model.backbone.model.{name}": value for name, value in backbone.state_dict().items()}
    config = DetectorConfig.parse(
        {"name": "deformable_detr", "backbone": {"name": "resnet50"}, **SIZES}
    )
    detector = build_detector(config, CLASSES).eval()
    renamed = rename(state, "deformable_detr")
    ours = {name.removeprefix("backbone."): value for name, value in renamed.items()}
    missing, unexpected = detector.backbone.load_state_dict(ours, strict=False)
    assert not missing
    assert all(name.endswith("num_batches_tracked") for name in unexpected)
    pixels = torch.randn(1, 3, 64, 96)
    for features, expected in zip(
        detector.backbone.pyramid(pixels, 3), backbone(pixels).feature_maps, strict=True
    ):
        scale = expected.abs().max()
        torch.testing.assert_close(features / scale, expected / scale)
