"""Official RT-DETR checkpoints, of both versions, import as Hugging Face's conversion of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from test_rt_detr_parity import CLASSES, SIZES, VARIANTS, their_model
from torch import Tensor

from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.imports.settings import Unseen
from d3etr.detectors.weights import load_weights
from d3etr.errors import UserError

NETWORK = (
    (r"^model\.backbone\.model\.embedder\.embedder\.0\.", "backbone.conv1.conv1_1."),
    (r"^model\.backbone\.model\.embedder\.embedder\.1\.", "backbone.conv1.conv1_2."),
    (r"^model\.backbone\.model\.embedder\.embedder\.2\.", "backbone.conv1.conv1_3."),
    (r"^model\.backbone\.model\.encoder\.stages\.", "backbone.res_layers."),
    (r"^(backbone\.res_layers\.\d)\.layers\.", r"\1.blocks."),
    (r"\.layer\.0\.", ".branch2a."),
    (r"\.layer\.1\.", ".branch2b."),
    (r"\.layer\.2\.", ".branch2c."),
    (r"\.shortcut\.1\.convolution\.", ".short.conv.conv."),
    (r"\.shortcut\.1\.normalization\.", ".short.conv.norm."),
    (r"\.shortcut\.convolution\.", ".short.conv."),
    (r"\.shortcut\.normalization\.", ".short.norm."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".norm."),
)
ENCODER = (
    (r"^model\.encoder\.aifi\.0\.", "encoder.encoder.0."),
    (r"^model\.encoder\.", "encoder."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.mlp\.fc(\d)\.", r".linear\1."),
)
DECODER = (
    (r"^model\.decoder_input_proj\.(\d)\.0\.", r"decoder.input_proj.\1.conv."),
    (r"^model\.decoder_input_proj\.(\d)\.1\.", r"decoder.input_proj.\1.norm."),
    (r"^model\.decoder\.layers\.", "decoder.decoder.layers."),
    (r"^model\.decoder\.query_pos_head\.", "decoder.query_pos_head."),
    (r"^model\.decoder\.class_embed\.", "decoder.dec_score_head."),
    (r"^model\.decoder\.bbox_embed\.", "decoder.dec_bbox_head."),
    (r"^model\.", "decoder."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
)
VERSIONS = {
    "like R18": ((r"^model\.encoder_input_proj\.", "encoder.input_proj."),),
    "v2": (
        (r"^model\.encoder_input_proj\.(\d)\.0\.", r"encoder.input_proj.\1.conv."),
        (r"^model\.encoder_input_proj\.(\d)\.1\.", r"encoder.input_proj.\1.norm."),
        (r"^model\.enc_output\.0\.", "decoder.enc_output.proj."),
        (r"^model\.enc_output\.1\.", "decoder.enc_output.norm."),
    ),
}


def official_name(name: str, version: str) -> str:
    """What the official code calls a tensor of transformers'."""
    part = NETWORK if "backbone" in name else ENCODER if name.startswith("model.encoder.") else ()
    ours = name
    for pattern, replacement in (*VERSIONS[version], *part, *DECODER):
        ours = re.sub(pattern, replacement, ours)
    last = "norm2" if ours.startswith("encoder.") else "norm3"
    return ours.replace("final_layer_norm", last)


def under_official_names(
    theirs: dict[str, Tensor], official: Callable[[str], str]
) -> dict[str, Tensor]:
    """Queries, keys and values of self-attention in one tensor, and what the official code adds."""
    state = {
        official(name): tensor
        for name, tensor in theirs.items()
        if not name.startswith(("class_embed", "bbox_embed"))  # twice, where layers are tied
    }
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
        state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    state = {name.replace(".o_proj.", ".out_proj."): tensor for name, tensor in state.items()}
    return state | {
        "decoder.anchors": torch.zeros(1, 8, 4),
        "decoder.valid_mask": torch.ones(1, 8, 1, dtype=torch.bool),
    }


def test_discrete_sampling_must_be_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = their_model(VARIANTS["v2"])
    state = under_official_names(model.state_dict(), partial(official_name, version="v2"))
    source, target = tmp_path / "rtdetrv2_r18vd_dsp_3x_coco.pth", tmp_path / "ours.safetensors"
    torch.save({"ema": {"module": state}}, source)
    categories = tuple((index, f"LABEL_{index}") for index in range(CLASSES))
    with pytest.raises(UserError, match="say --sampling discrete or bilinear"):
        import_weights(source, target, Unseen(heads=4), categories)
    for sampling in ("discrete", "bilinear"):
        said = Unseen(heads=4, sampling=sampling)
        imported = import_weights(source, target, said, categories)
        assert imported.architecture["sampling"] == sampling


@pytest.mark.parametrize("version", VERSIONS)
def test_official_checkpoints_equal_hugging_faces(version: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = their_model(VARIANTS[version])
    model.save_pretrained(tmp_path / "theirs")
    state = under_official_names(model.state_dict(), partial(official_name, version=version))
    known = {name.split(".")[0] for name in state}
    assert known == {"backbone", "encoder", "decoder"}
    assert "encoder.encoder.0.layers.0.self_attn.in_proj_weight" in state
    assert "decoder.decoder.layers.2.cross_attn.sampling_offsets.bias" in state
    assert "backbone.res_layers.1.blocks.0.short.conv.conv.weight" in state
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    checkpoint = {"model": wrong, "ema": {"module": state, "updates": 7}, "epoch": 71}
    torch.save(checkpoint, tmp_path / "official.pth")
    categories = tuple((index, f"LABEL_{index}") for index in range(CLASSES))
    found = {}
    for name, source in {"official": "official.pth", "theirs": "theirs"}.items():
        named, options = (categories, Unseen(heads=4)) if name == "official" else (None, None)
        import_weights(tmp_path / source, tmp_path / f"{name}.safetensors", options, named)
        found[name] = load_weights(tmp_path / f"{name}.safetensors")
    ours, expected = found["official"][0], found["theirs"][0]
    assert ours.config.queries == 300  # no tensor shows them
    for _, info in found.values():  # what the official code does to images; no file says it here
        assert info.preprocessing.exact_size == (640, 640)
        assert info.preprocessing.normalisation == "unit"
    unseen = {"queries", "denoising", "dropout"}
    assert ours.config.model_dump(exclude=unseen) == expected.config.model_dump(exclude=unseen)
    assert expected.config.queries == SIZES["queries"]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
