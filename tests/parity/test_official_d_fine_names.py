"""Official checkpoints of D-FINE and DEIM import as Hugging Face's conversion of them."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from test_d_fine_parity import CLASSES, VARIANTS, require_equal, their_model
from test_hgnet import OFFICIAL as NETWORK
from test_official_rt_detr_names import DECODER, under_official_names
from torch import Tensor, nn
from transformers.models.d_fine.modeling_d_fine import DFineMLP, DFineMLPPredictionHead

from d3etr.detectors.d_fine import DFINE
from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.imports.layouts import official_detector
from d3etr.detectors.imports.settings import Unseen
from d3etr.detectors.weights import load_weights
from d3etr.errors import UserError

ENCODER_LAYERS = (
    (r"downsample_convs\.(\d)\.conv(\d)\.", r"downsample_convs.\1.0.cv\2."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.mlp\.layers\.0\.", ".linear1."),
    (r"\.mlp\.layers\.1\.", ".linear2."),
    (r"final_layer_norm", "norm2"),
)
ENCODER = (
    (r"^model\.encoder\.aifi\.0\.", "encoder.encoder.0."),
    (r"^model\.encoder_input_proj\.(\d)\.0\.", r"encoder.input_proj.\1.conv."),
    (r"^model\.encoder_input_proj\.(\d)\.1\.", r"encoder.input_proj.\1.norm."),
    (r"^model\.encoder\.", "encoder."),
    (r"_blocks\.(\d)\.conv([14])\.", r"_blocks.\1.cv\2."),
    (r"_blocks\.(\d)\.csp_rep1\.", r"_blocks.\1.cv2.0."),
    (r"_blocks\.(\d)\.conv2\.", r"_blocks.\1.cv2.1."),
    (r"_blocks\.(\d)\.csp_rep2\.", r"_blocks.\1.cv3.0."),
    (r"_blocks\.(\d)\.conv3\.", r"_blocks.\1.cv3.1."),
    *ENCODER_LAYERS,
)
HEADS = (
    (r"^model\.enc_output\.0\.", "decoder.enc_output.proj."),
    (r"^model\.enc_output\.1\.", "decoder.enc_output.norm."),
    (r"^model\.decoder\.lqe_layers\.", "decoder.decoder.lqe_layers."),
    (r"^model\.decoder\.pre_bbox_head\.", "decoder.pre_bbox_head."),
    (r"^model\.decoder\.(up|reg_scale)$", r"decoder.\1"),
    (r"\.mlp\.layers\.0\.", ".linear1."),
    (r"\.mlp\.layers\.1\.", ".linear2."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    *DECODER,
    (r"final_layer_norm", "norm3"),
)


def official_name(name: str) -> str:
    """What the official code calls a tensor of transformers'."""
    rules = HEADS
    if name.startswith("model.backbone."):
        name, rules = name.removeprefix("model.backbone.model."), NETWORK
    elif name.startswith("model.encoder"):
        rules = ENCODER
    begins = "backbone." if rules is NETWORK else ""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return begins + name


def official_state(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under official names; queries, keys and values of self-attention in one tensor."""
    state = under_official_names(theirs, official_name)
    return state | {
        "decoder.decoder.up": state["decoder.up"],
        "decoder.decoder.reg_scale": state["decoder.reg_scale"],
        "backbone.stem.stem1.bn.num_batches_tracked": torch.tensor(7),
    }


EXPECTED = (
    *("backbone.stem.stem2b.lab.scale", "backbone.stages.1.downsample.bn.running_var"),
    "backbone.stages.2.blocks.1.layers.2.conv1.conv.weight",
    *("backbone.stages.0.blocks.0.aggregation.1.conv.weight", "encoder.input_proj.1.conv.weight"),
    *(
        "encoder.encoder.0.layers.0.self_attn.in_proj_weight",
        "encoder.fpn_blocks.0.cv1.conv.weight",
    ),
    "encoder.pan_blocks.0.cv2.0.bottlenecks.0.conv2.norm.running_mean",
    *("encoder.fpn_blocks.0.cv3.1.conv.weight", "encoder.downsample_convs.0.0.cv2.norm.bias"),
    *("encoder.lateral_convs.0.conv.weight", "decoder.decoder.layers.1.gateway.gate.weight"),
    *("decoder.decoder.layers.2.gateway.norm.bias", "decoder.decoder.layers.0.linear1.weight"),
    *("decoder.decoder.layers.0.norm1.bias", "decoder.decoder.layers.0.norm3.bias"),
    "decoder.decoder.layers.0.cross_attn.sampling_offsets.bias",
    "decoder.decoder.layers.0.cross_attn.num_points_scale",
    *("decoder.decoder.lqe_layers.2.reg_conf.layers.1.weight", "decoder.enc_output.proj.weight"),
    *("decoder.pre_bbox_head.layers.2.bias", "decoder.dec_bbox_head.2.layers.2.weight"),
    *("decoder.dec_score_head.1.bias", "decoder.query_pos_head.layers.1.weight"),
)
"""Some of their names, so that what the rules above make of names is what the code has."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_checkpoints_equal_hugging_faces(variant: str, tmp_path: Path) -> None:
    model = their_model(VARIANTS[variant])
    model.save_pretrained(tmp_path / "theirs")
    state = official_state(model.state_dict())
    assert official_detector(state) == "d_fine"
    assert {name.split(".")[0] for name in state} == {"backbone", "encoder", "decoder"}
    assert not {*EXPECTED} - state.keys()
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    checkpoint = {"model": wrong, "ema": {"module": state, "updates": 7}, "last_epoch": 71}
    torch.save(checkpoint, tmp_path / "official.pth")
    categories = tuple((index, f"LABEL_{index}") for index in range(CLASSES))
    found = {}
    for name, source in {"official": "official.pth", "theirs": "theirs"}.items():
        named = categories if name == "official" else None
        import_weights(tmp_path / source, tmp_path / f"{name}.safetensors", None, named)
        found[name] = load_weights(tmp_path / f"{name}.safetensors")
    ours, expected = found["official"][0], found["theirs"][0]
    unseen = {"queries", "denoising", "dropout"}
    assert ours.config.model_dump(exclude=unseen) == expected.config.model_dump(exclude=unseen)
    assert (ours.config.queries, ours.config.heads) == (300, 4)  # no tensor shows the former
    assert ours.config.dropout == 0.0
    for name, tensor in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@torch.no_grad()
def test_checkpoints_of_deim_have_another_activation(tmp_path: Path) -> None:
    """Which tensors do not show: it is asked for where a file's name says DEIM, else noted."""
    model = their_model(VARIANTS["S"])
    for name, module in model.model.named_modules():
        if isinstance(module, DFineMLPPredictionHead):
            module.forward = functools.partial(DFineMLP.forward, module)
        if isinstance(module, DFineMLP | DFineMLPPredictionHead) and "encoder.aifi" not in name:
            module.act = nn.SiLU()
    source, target = tmp_path / "deim_s.pth", tmp_path / "ours.safetensors"
    torch.save(official_state(model.state_dict()), source)
    categories = tuple((index, f"LABEL_{index}") for index in range(CLASSES))
    with pytest.raises(UserError, match="say --activation silu or relu"):
        import_weights(source, target, None, categories)
    result = import_weights(source, target, Unseen(activation="silu"), categories)
    assert (result.architecture["activation"], result.notes) == ("silu", ())
    detector = load_weights(target)[0].eval()
    assert isinstance(detector, DFINE)
    detector.proposals.queries = 11  # of 300, which no tensor shows
    require_equal(detector, model, torch.randn(2, 3, 96, 128))
    source = source.rename(tmp_path / "s.pth")
    result = import_weights(source, target, None, categories)
    assert result.architecture["activation"] == "relu"
    assert [note for note in result.notes if "import it with --activation silu" in note]


@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        ("decoder.up", None, r"no tensor '...decoder.up'"),
        ("decoder.reg_scale", torch.zeros(1), "curvature|greater than 0"),
        ("decoder.reg_scale", torch.zeros(0), "reg_scale' has shape"),
        ("num_points_scale", torch.tensor([0.5, 0.5, 0.3]), "no 1 / P"),
        ("num_points_scale", torch.tensor([float("nan")] * 4), "no 1 / P"),
        ("num_points_scale", torch.tensor([1e-30]), "no 1 / P"),
        ("num_points_scale", torch.ones(5), "sampling offsets of 5 points"),
        ("num_points_scale", torch.full((12,), 1 / 12), "points has 1 numbers for 3 levels"),
    ],
)
def test_broken_settings_among_tensors_are_refused(
    name: str, tensor: Tensor | None, text: str, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    changed = {key: x for key, x in state.items() if not key.endswith(name)}
    assert len(changed) < len(state)
    if tensor is not None:
        place = "decoder.decoder.layers.0.cross_attn." if name.startswith("num") else ""
        changed[place + name] = tensor
    torch.save(changed, tmp_path / "official.pth")
    with pytest.raises(UserError, match=text):
        import_weights(tmp_path / "official.pth", tmp_path / "ours.safetensors")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return official_state(their_model(VARIANTS["S"]).state_dict())
