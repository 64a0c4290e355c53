"""D-FINE against transformers' with the same random weights, imported from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hgnet import configuration
from test_rt_detr_parity import assert_close
from torch import Tensor, nn

from d3etr.detectors.d_fine import DFINE
from d3etr.detectors.imports.importing import Imported, import_weights
from d3etr.detectors.weights import load_weights
from d3etr.errors import UserError
from d3etr.structures import ImageBatch

transformers = pytest.importorskip("transformers")

CLASSES = 7


@dataclass(frozen=True)
class Variant:
    """One of their models, and what it is to be called here.

    Attributes:
        options: of their configuration.
        ours: that our configuration has to have.
        levels: feature levels.
        told: ``up`` and ``reg_scale`` as its tensors, not its configuration, have them.
        image: (height, width), multiples of 32 for theirs.
    """

    options: Mapping[str, Any]
    ours: Mapping[str, Any] = field(default_factory=dict)
    levels: int = 3
    told: tuple[float, float] = (0.5, 4.0)
    image: tuple[int, int] = (96, 128)


VARIANTS = {
    "S": Variant(
        {
            **{"encoder_hidden_dim": 32, "d_model": 32, "hidden_expansion": 0.5},
            **{"depth_mult": 0.34, "decoder_n_points": [3, 6, 3], "max_num_bins": 8},
        },
        {
            **{"width": 32, "encoder_width": 32, "expansion": 0.5, "encoder_blocks": 1},
            **{"points": (3, 6, 3), "bins": 8, "bound": 0.5, "curvature": 4.0},
        },
    ),
    "N: two levels": Variant(
        {
            **{"encoder_hidden_dim": 16, "d_model": 16, "hidden_expansion": 0.34},
            **{"depth_mult": 0.5, "decoder_n_points": [6, 6], "max_num_bins": 8},
            **{"feat_strides": [16, 32], "learn_initial_query": False, "num_denoising": 0},
        },
        {
            **{"width": 16, "encoder_width": 16, "expansion": 0.25, "encoder_blocks": 2},
            **{"points": (6, 6), "denoising": {"queries": 0}},
        },
        levels=2,
        image=(96, 160),
    ),
    "X: the encoder is wider, tensors tell the bins": Variant(
        {
            **{"encoder_hidden_dim": 48, "d_model": 32, "hidden_expansion": 1.0},
            **{"depth_mult": 1.0, "decoder_n_points": 2, "max_num_bins": 12},
            **{"num_denoising": 20, "label_noise_ratio": 0.3, "box_noise_scale": 0.5},
        },
        {
            **{"width": 32, "encoder_width": 48, "expansion": 1.0, "encoder_blocks": 3},
            **{"points": (2, 2, 2), "bins": 12, "bound": 0.25, "curvature": 8.0},
            **{"denoising": {"queries": 20, "label_noise": 0.3, "box_noise": 0.5}},
        },
        told=(0.25, 8.0),
    ),
}


def their_model(variant: Variant) -> Any:
    """With random weights, in training mode but for batch norms: it gives every layer's outputs."""
    torch.manual_seed(0)
    levels, options = variant.levels, variant.options
    config = transformers.DFineConfig(
        backbone_config=configuration(0, out_features=["stage2", "stage3", "stage4"][-levels:]),
        encoder_in_channels=[256, 512, 1024][-levels:],
        encode_proj_layers=[levels - 1],
        encoder_ffn_dim=40,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_in_channels=[options["encoder_hidden_dim"]] * levels,
        decoder_ffn_dim=48,
        decoder_layers=3,
        num_feature_levels=levels,
        num_queries=11,
        num_labels=CLASSES,
        attn_implementation="eager",
        **options,
    )
    model = transformers.DFineForObjectDetection(config).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            randomise(name, tensor)
        for name, value in zip(("up", "reg_scale"), variant.told, strict=True):
            model.get_parameter(f"model.decoder.{name}").fill_(value)
    return model


def randomise(name: str, tensor: Tensor) -> None:
    """Weights by which every part matters and nothing saturates."""
    if name.endswith(("num_points_scale", "num_batches_tracked")) or not tensor.numel():
        return
    if name.endswith("running_var"):
        tensor.uniform_(0.5, 1.5)
    elif name.endswith(".lab.scale"):
        tensor.uniform_(1, 1.5)
    elif tensor.dim() > 1:
        tensor.normal_(std=(1.1 if "backbone" in name else 0.8) * tensor[0].numel() ** -0.5)
        if "bbox_embed" in name:
            tensor.mul_(2)
        if "denoising_class_embed" in name:
            tensor[-1] = 0.0
    elif name.endswith("weight"):
        tensor.uniform_(0.5, 1.5)
    else:
        tensor.add_(0.05 * torch.randn_like(tensor))


def imported(model: Any, folder: Path) -> tuple[DFINE, Imported]:
    """Ours of their folder, in evaluation mode."""
    model.save_pretrained(folder / "theirs")
    result = import_weights(folder / "theirs", folder / "ours.safetensors")
    detector, info = load_weights(folder / "ours.safetensors")
    assert isinstance(detector, DFINE)
    assert [name for _, name in info.categories] == [f"LABEL_{k}" for k in range(CLASSES)]
    return detector.eval(), result


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_every_layer_and_the_selection_equal_theirs(variant: Variant, tmp_path: Path) -> None:
    model = their_model(variant)
    detector, result = imported(model, tmp_path)
    assert result.network == "d_fine"
    [note] = result.notes  # of its folder
    assert "no preprocessor_config.json: assumed images of 640 x 640" in note
    config = detector.config
    assert config.backbone.name == "timm/hgnetv2_b0"
    found = config.model_dump()
    for key, value in variant.ours.items():
        part = {k: found[key][k] for k in value} if isinstance(value, dict) else found[key]
        assert part == value, key
    assert (config.levels, config.queries, config.heads, config.encoder_feedforward) == (
        variant.levels,
        *(11, 4, 40),
    )
    require_equal(detector, model, torch.randn(2, 3, *variant.image))


def require_equal(detector: DFINE, model: Any, pixels: Tensor) -> None:
    """What both make of images: the selection, first outputs, and those of every layer."""
    theirs = model.model(pixels)
    memory = detector.encode(ImageBatch(pixels))
    queries = detector.object_queries(memory)
    [ours] = detector.decode(memory, [queries])
    assert memory.proposals is not None and queries.reference_logits is not None
    assert_close(memory.proposals.logits[0], theirs.enc_topk_logits)
    assert_close(memory.proposals.boxes_cxcywh[0], theirs.enc_topk_bboxes, 1e-5)
    assert_close(queries.reference_logits, theirs.init_reference_points)

    distributions = ours.distributions
    assert distributions is not None
    # Theirs come with the first outputs, before edges move, in front of those of all layers.
    logits, boxes = theirs.intermediate_logits, theirs.intermediate_reference_points
    assert logits.shape[1] == boxes.shape[1] == 4
    assert_close(distributions.first_logits, logits[:, 0])
    assert_close(distributions.first_boxes, boxes[:, 0], 1e-5)
    assert_close(ours.logits.transpose(0, 1), logits[:, 1:])
    assert_close(ours.boxes_cxcywh.transpose(0, 1), boxes[:, 1:])
    corners = theirs.intermediate_predicted_corners
    assert_close(distributions.corners.transpose(0, 1).flatten(-2), corners)
    assert_close(distributions.start, theirs.initial_reference_points[:, 0], 1e-5)
    # The comparison would say little if layers, images or queries were alike.
    for part in (logits, boxes, corners):
        for dimension in range(3):
            assert part.std(dimension).mean() > 0.005
    # Quality is of the corners: without it, the first layer's logits are the first outputs'.
    assert (ours.logits[0] - distributions.first_logits).abs().max() > 0.01


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"decoder_method": "discrete"}, "decoder_method is 'discrete', expected 'default'"),
        ({"top_prob_values": 3}, "top_prob_values is 3, expected 4"),
        ({"eval_idx": 1}, "eval_idx is 1, expected -1"),
        ({"layer_scale": 2}, "layer_scale is 2"),
        ({"encode_proj_layers": [1]}, r"encode_proj_layers is \[1\], expected \[2\]"),
        ({"decoder_activation_function": "silu"}, "decoder_activation_function is 'silu'"),
        ({"backbone_config.stem_strides": [2, 1, 1, 1, 1]}, r"backbone_config: stem_strides is"),
        ({"backbone_config.hidden_act": "silu"}, "backbone_config: hidden_act is 'silu'"),
        ({"decoder_attention_heads": 8, "encoder_attention_heads": 8}, "and 8 heads are asked for"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], text: str, tmp_path: Path, folder: Path
) -> None:
    copied = tmp_path / "changed"
    copied.mkdir()
    for file in folder.iterdir():
        (copied / file.name).symlink_to(file)
    settings = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        part, _, within = key.partition(".")
        assert part in settings
        if within:
            settings[part][within] = value
        else:
            settings[part] = value
    (copied / "config.json").unlink()
    (copied / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=text):
        import_weights(copied, tmp_path / "ours.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("d_fine") / "theirs"
    their_model(VARIANTS["S"]).save_pretrained(path)
    return path
