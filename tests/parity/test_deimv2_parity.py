"""DEIMv2 against transformers' with the same random weights, imported from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from test_d_fine_parity import CLASSES, imported, randomise, require_equal
from torch import Tensor, nn

from d3etr.config.backbone import BackboneConfig
from d3etr.detectors.deimv2 import DEIMv2
from d3etr.detectors.exports.backbones import describe_backbone
from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.imports.layouts import rename
from d3etr.detectors.imports.settings import from_config
from d3etr.errors import UserError
from d3etr.structures import ImageBatch

transformers = pytest.importorskip("transformers")


@dataclass(frozen=True)
class Variant:
    """One of their models, and what it is to be called here.

    Attributes:
        options: of their configuration.
        ours: that our configuration has to have.
        backbone: ours.
        levels: feature levels.
        stages: of the backbone that are read.
        image: (height, width), multiples of 32 for theirs.
        vit: of the configuration of their DINOv3, if it is the backbone.
    """

    options: Mapping[str, Any]
    ours: Mapping[str, Any] = field(default_factory=dict)
    backbone: str = "timm/hgnetv2_b0"
    levels: int = 2
    stages: int = 2
    image: tuple[int, int] = (96, 160)
    vit: Mapping[str, Any] = field(default_factory=dict)


VIT = {
    **{"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 4},
    **{"intermediate_size": 48, "out_indices": [2, 3, 4]},
}
VIT_HERE = {
    **{"width": 128, "heads": 2, "blocks": 4, "inner": 48, "outputs": (2, 3, 4)},
    **{"feedforward": "gelu", "registers": 0, "key_bias": False, "normed": "all"},
}
LITE = {
    **{"encoder_type": "lite", "encoder_layers": 0, "use_gateway": False},
    **{"share_bbox_head": True, "depth_mult": 0.5, "decoder_n_points": [4, 2]},
}
LITE_HERE = {
    **{"encoder": "lite", "encoder_layers": 0, "fusion": "elan4", "gateway": False},
    **{"shared_box_head": True, "points": (4, 2), "encoder_blocks": 2},
}
VARIANTS = {
    "N": Variant(
        {
            **{"encoder_hidden_dim": 16, "d_model": 16, "hidden_expansion": 0.34},
            **{"depth_mult": 0.5, "decoder_n_points": [6, 6]},
            **{"decoder_activation_function": "silu"},
        },
        {
            **{"width": 16, "encoder_width": 16, "encoder_blocks": 2, "fusion": "elan4"},
            **{"points": (6, 6), "activation": "silu", "encoder": "hybrid", "gateway": True},
            **{"shared_box_head": False, "bins": 8},
        },
    ),
    "S over HGNet: elan5, a wider encoder": Variant(
        {
            **{"encoder_hidden_dim": 48, "d_model": 32, "hidden_expansion": 0.5},
            **{"depth_mult": 1.0, "decoder_n_points": 2, "encoder_has_trailing_conv": False},
            **{"num_denoising": 20, "label_noise_ratio": 0.3, "box_noise_scale": 0.5},
        },
        {
            **{"width": 32, "encoder_width": 48, "encoder_blocks": 3, "fusion": "elan5"},
            **{"points": (2, 2, 2), "activation": "relu", "expansion": 0.5},
            **{"denoising": {"queries": 20, "label_noise": 0.3, "box_noise": 0.5}},
        },
        levels=3,
        stages=3,
        image=(96, 128),
    ),
    "Atto": Variant(
        {**LITE, "encoder_hidden_dim": 16, "d_model": 16, "hidden_expansion": 0.34},
        {**LITE_HERE, "width": 16, "encoder_width": 16, "activation": "relu"},
        backbone="timm/hgnetv2_atto",
        stages=1,
    ),
    "Pico: a gate, heads of their own": Variant(
        {
            **{**LITE, "use_gateway": True, "share_bbox_head": False},
            **{"encoder_hidden_dim": 32, "d_model": 32, "hidden_expansion": 0.5},
            **{"decoder_activation_function": "silu", "num_denoising": 0},
        },
        {
            **{**LITE_HERE, "gateway": True, "shared_box_head": False},
            **{"width": 32, "encoder_width": 32, "activation": "silu"},
            **{"denoising": {"queries": 0}},
        },
        backbone="timm/hgnetv2_pico",
        stages=1,
        image=(128, 96),
    ),
    "S: DINOv3 without registers": Variant(
        {
            **{"encoder_hidden_dim": 32, "d_model": 32, "hidden_expansion": 0.34},
            **{"depth_mult": 0.67, "encoder_has_trailing_conv": False},
            **{"decoder_n_points": [3, 6, 3], "decoder_activation_function": "silu"},
            **{"spatial_tuning_adapter_inplanes": 4},
        },
        {
            **{"width": 32, "encoder_width": 32, "fusion": "elan5", "encoder_blocks": 2},
            "backbone": {
                "dinov3": {
                    **VIT_HERE,
                    **{"epsilon": 1e-6, "detail": 4, "normed": "last", "first_scale": 1.0},
                    **{"blocks": 3, "outputs": (1, 2, 3)},
                }
            },
        },
        backbone="dinov3",
        levels=3,
        stages=3,
        image=(96, 128),
        vit={
            **{**VIT, "apply_layernorm": False, "layer_norm_eps": 1e-6},
            **{"pos_embed_rescale": None, "num_hidden_layers": 3, "out_indices": [1, 2, 3]},
        },
    ),
    "X: registers and gated blocks": Variant(
        {
            **{"encoder_hidden_dim": 48, "d_model": 16, "hidden_expansion": 1.25},
            **{"depth_mult": 1.37, "encoder_has_trailing_conv": False},
            **{"decoder_n_points": 2, "spatial_tuning_adapter_inplanes": 8},
        },
        {
            **{"width": 16, "encoder_width": 48, "fusion": "elan5", "encoder_blocks": 4},
            "backbone": {
                "dinov3": {
                    **VIT_HERE,
                    **{"feedforward": "silu_gated", "registers": 3, "key_bias": True},
                    **{"epsilon": 1e-5, "detail": 8, "first_scale": 1e-5},
                }
            },
        },
        backbone="dinov3",
        levels=3,
        stages=3,
        image=(96, 128),
        vit={
            **{**VIT, "use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 3},
            **{"key_bias": True, "layerscale_value": 1e-5, "pos_embed_rescale": None},
        },
    ),
}


def their_backbone(variant: Variant) -> tuple[Any, list[int]]:
    """Its configuration, and the channels of the stages that are read."""
    if variant.vit:
        config = transformers.DINOv3ViTConfig(**variant.vit)
        return config, [variant.options["encoder_hidden_dim"]] * 3
    settings = describe_backbone(BackboneConfig(name=variant.backbone), variant.stages)
    config = transformers.AutoConfig.for_model(**settings)
    return config, list(settings["hidden_sizes"][-variant.stages :])


def their_model(variant: Variant, **changes: Any) -> Any:
    """With random weights, in training mode but for batch norms: it gives every layer's outputs."""
    torch.manual_seed(0)
    backbone, channels = their_backbone(variant)
    settings: dict[str, Any] = {
        "backbone_config": backbone,
        "encoder_in_channels": channels,
        "feat_strides": [8, 16, 32][-variant.stages :],
        "encode_proj_layers": [variant.levels - 1],
        "encoder_ffn_dim": 40,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_in_channels": [variant.options["encoder_hidden_dim"]] * variant.levels,
        "decoder_ffn_dim": 48,
        "decoder_layers": 3,
        "num_feature_levels": variant.levels,
        "num_queries": 11,
        "num_labels": CLASSES,
        "max_num_bins": 8,
        "attn_implementation": "eager",
    }
    config = transformers.Deimv2Config(**(settings | dict(variant.options) | changes))
    model = transformers.Deimv2ForObjectDetection(config).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            randomise(name, tensor)
            if name.endswith("lambda1"):  # else blocks would hardly matter
                tensor.uniform_(0.5, 1.5)
        model.get_parameter("model.decoder.up").fill_(0.5)
        model.get_parameter("model.decoder.reg_scale").fill_(4.0)
    return model


def assert_holds(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_holds(found[key], value)
        else:
            assert found[key] == value, key


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_every_layer_and_the_selection_equal_theirs(variant: Variant, tmp_path: Path) -> None:
    model = their_model(variant)
    detector, result = imported(model, tmp_path)
    assert isinstance(detector, DEIMv2)
    assert result.network == "deimv2" and result.preprocessing is not None
    normalisation = "imagenet" if variant.vit else "unit"
    assert result.preprocessing["normalisation"] == normalisation
    assert result.preprocessing["exact_size"] == [640, 640]
    [note] = result.notes
    assert f"assumed images of 640 x 640 pixels, normalisation '{normalisation}'" in note
    config = detector.config
    assert config.backbone.name == variant.backbone
    assert config.implementation == "transformers"
    found = config.model_dump()
    assert_holds(found, variant.ours)
    assert (config.levels, config.queries, config.heads, config.feedforward) == (
        variant.levels,
        *(11, 4, 48),
    )
    for size in (variant.image, (64, 64)):
        pixels = torch.randn(2, 3, *size)
        require_equal(detector, model, pixels)
        scores = model.model(pixels).enc_outputs_class.amax(-1)
        place = detector.object_queries(detector.encode(ImageBatch(pixels))).place
        assert place is not None
        assert torch.equal(place, scores.topk(11, dim=1).indices)


@pytest.mark.parametrize("name", ["N", "Atto", "X: registers and gated blocks"])
def test_every_tensor_is_taken_from_theirs(name: str, tmp_path: Path) -> None:
    model = their_model(VARIANTS[name])
    detector, _ = imported(model, tmp_path)
    renamed = rename(model.state_dict(), "deimv2")
    ours = detector.state_dict()
    assert renamed.keys() == ours.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, renamed[key]), key


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"decoder_method": "discrete"}, "decoder_method is 'discrete', expected 'default'"),
        ({"encoder_fuse_op": "cat"}, "encoder_fuse_op is 'cat', expected 'sum'"),
        ({"eval_size": [640, 640]}, r"eval_size is \[640, 640\]"),
        ({"layer_scale": 2}, "layer_scale is 2"),
        ({"encode_proj_layers": [0]}, r"encode_proj_layers is \[0\], expected \[1\]"),
        ({"decoder_activation_function": "gelu"}, "decoder_activation_function is 'gelu'"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], text: str, tmp_path: Path, folder: Path
) -> None:
    copied = tmp_path / "changed"
    copied.mkdir()
    (copied / "model.safetensors").symlink_to(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    assert changes.keys() <= settings.keys()
    (copied / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(UserError, match=text):
        import_weights(copied, tmp_path / "ours.safetensors")


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        ("deimv2", {"patch_size": 14}, "backbone_config: patch_size is 14, expected 16"),
        ("deimv2", {"rope_theta": 50.0}, "backbone_config: rope_theta is 50.0"),
        ("deimv2", {"hidden_act": "relu"}, "backbone_config: hidden_act is 'relu'"),
        ("deimv2", {"num_channels": 1}, "backbone_config: num_channels is 1"),
        ("d_fine", {}, "backbone_config: model_type is 'dinov3_vit', expected 'resnet'"),
    ],
)
def test_other_networks_are_refused(kind: str, changes: dict[str, Any], text: str) -> None:
    network = {"model_type": "dinov3_vit", "hidden_act": "gelu", "patch_size": 16, **changes}
    settings = {"model_type": kind, "activation_function": "silu", "backbone_config": network}
    with pytest.raises(UserError, match=text):
        from_config(settings, "config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deimv2") / "theirs"
    their_model(VARIANTS["N"]).save_pretrained(path)
    return path


def means(pixels: Tensor, padding: Tensor | None) -> Tensor:
    """What the lite encoder's coarser level of a picture is."""
    torch.manual_seed(0)
    from d3etr.config.detector import DetectorConfig
    from d3etr.detectors.deimv2 import LiteEncoder, summing_blocks

    config = DetectorConfig.parse(
        {"name": "deimv2", **LITE_HERE, "levels": 2, "width": 16, "heads": 2, "encoder_width": 16}
    )
    encoder = LiteEncoder(config, [3], summing_blocks(config)).eval()
    return encoder.look_around(pixels, padding)


@torch.no_grad()
def test_cells_under_padding_do_not_count_in_the_mean() -> None:
    picture = torch.randn(1, 16, 3, 4)
    padded = nn.functional.pad(picture, (0, 2, 0, 1), value=7.0)
    padding = torch.ones(1, 4 * 32, 6 * 32, dtype=torch.bool)
    padding[:, : 3 * 32, : 4 * 32] = False
    found = means(padded, padding)[..., :3, :4]
    torch.testing.assert_close(found, means(picture, None))
