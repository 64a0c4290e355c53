"""Official LW-DETR checkpoints import as Hugging Face's folders of the same tensors."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_grouped_parity import CLASSES, PLAIN, Variant, assert_close, their_model
from torch import Tensor

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.weights import load_weights
from d3etr.errors import UserError
from d3etr.structures import ImageBatch

transformers = pytest.importorskip("transformers")

NAMES = tuple((number, f"LABEL_{number}") for number in range(CLASSES))
SMALL = Variant(
    "lw_detr",
    {
        **PLAIN,
        "hidden_size": 48,
        "num_attention_heads": 12,
        "num_hidden_layers": 10,
        "num_windows": 16,
        "window_block_indices": [0, 1, 3, 6, 7, 9],
        "out_indices": [3, 5, 6, 10],
        "image_size": 512,
    },
    {},
    {"projector_scale_factors": [1.0], "decoder_self_attention_heads": 1}
    | {"decoder_cross_attention_heads": 2},
)
LARGE = replace(SMALL, options={**SMALL.options, "projector_scale_factors": [2.0, 0.5]})
TINY = replace(
    SMALL,
    backbone={
        **SMALL.backbone,
        "num_hidden_layers": 6,
        "window_block_indices": [0, 2, 4],
        "out_indices": [2, 4, 6],
    },
)
ARGS: Mapping[str, Any] = {
    "encoder": "vit_tiny",
    "two_stage": True,
    "bbox_reparam": True,
    "lite_refpoint_refine": True,
    "decoder_norm": "LN",
    "position_embedding": "sine",
    "dec_n_points": 2,
    "dropout": 0,
    "num_queries": 9,
    "sa_nheads": 1,
    "ca_nheads": 2,
    "window_block_indexes": [0, 1, 3, 6, 7, 9],
    "out_feature_indexes": [2, 4, 5, -1],
    "projector_scale": ["P4"],
}
OFFICIAL = (
    (
        r"^model\.backbone\.backbone\.embeddings\.position_embeddings$",
        "backbone.0.encoder.pos_embed",
    ),
    (r"^model\.backbone\.backbone\.embeddings\.projection", "backbone.0.encoder.patch_embed.proj"),
    (r"^model\.backbone\.backbone\.encoder\.layer\.", "backbone.0.encoder.blocks."),
    (r"\.attention\.([qv])_proj\.bias$", r".attn.\1_bias"),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.intermediate\.", ".mlp."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^model\.backbone\.projector\.scale_layers\.(\d+)\.layer_norm\.", r"PROJECTOR.stages.\1.1."),
    (
        r"^model\.backbone\.projector\.scale_layers\.(\d+)\.projector_layer\.",
        r"PROJECTOR.stages.\1.0.",
    ),
    (
        r"^model\.backbone\.projector\.scale_layers\.(\d+)\.sampling_layers\.(\d+)\.layers\.",
        r"PROJECTOR.stages_sampling.\1.\2.",
    ),
    (r"^(PROJECTOR\..*\.)bottlenecks\.", r"\1m."),
    (r"^(PROJECTOR\..*)\.conv([12])\.", r"\1.cv\2."),
    (r"^(PROJECTOR\..*)\.norm\.", r"\1.bn."),
    (r"^PROJECTOR\.", "backbone.0.projector."),
    (r"^model\.reference_point_embed\.", "refpoint_embed."),
    (r"^model\.query_feat\.", "query_feat."),
    (r"^model\.", "transformer."),
    (r"^(transformer\.decoder\.layers\.\d+)\.mlp\.fc([12])\.", r"\1.linear\2."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.cross_attn_layer_norm\.", ".norm2."),
    (r"^(transformer\.decoder\.layers\.\d+)\.layer_norm\.", r"\1.norm3."),
    (r"^transformer\.decoder\.layernorm\.", "transformer.decoder.norm."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
)
"""From transformers' names to those of Atten4Vis/LW-DETR's modules."""


def official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as LW-DETR's code names and joins them."""
    found = {}
    for name, tensor in tensors.items():
        ours, joined = name, re.fullmatch(r"(.*)\.q_proj\.(weight|bias)", name)
        if joined and (".self_attn." in name or joined[2] == "weight"):
            letters = [tensors[f"{joined[1]}.{x}_proj.{joined[2]}"] for x in "qkv"]
            tensor = torch.cat(letters)
            own = "in_proj_" if ".self_attn" in name else "qkv."
            ours = f"{joined[1]}.{own}{joined[2]}".replace(".attention.", ".attn.")
        elif re.search(r"self_attn\.[kv]_proj|attention\.[kv]_proj\.weight", name):
            continue
        for pattern, replacement in OFFICIAL:
            ours = re.sub(pattern, replacement, ours)
        found[ours] = tensor
    return found


@pytest.mark.parametrize(
    ("variant", "args"),
    [
        (SMALL, ARGS),
        (SMALL, {"dropout": 0}),
        (LARGE, {"dropout": 0}),
        (TINY, {"dropout": 0, "projector_scale": "P4"}),
    ],
    ids=["args", "small", "large", "tiny"],
)
@torch.no_grad()
def test_checkpoints_and_folders_give_the_same(
    variant: Variant, args: Mapping[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, folder = their_model(variant), tmp_path / "folder"
    model.save_pretrained(folder)
    checkpoint = tmp_path / "LWDETR_60e_coco.pth"
    tensors = official(model.state_dict())
    assert tensors["backbone.0.encoder.blocks.0.attn.qkv.weight"].shape == (144, 48)
    assert "transformer.decoder.layers.0.self_attn.in_proj_weight" in tensors
    assert "backbone.0.projector.stages.0.0.m.2.cv2.bn.running_mean" in tensors
    torch.save({"model": tensors, "args": Namespace(**args)}, checkpoint)
    found, notes = {}, {}
    for source, names in ((folder, None), (checkpoint, NAMES)):
        target = tmp_path / f"{source.stem}.safetensors"
        notes[source] = import_weights(source, target, categories=names).notes
        found[source] = load_weights(target)
    (ours, info), (other, other_info) = found.values()
    assert isinstance(info.detector, DetectorConfig) and info.detector == other_info.detector
    expected = other.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    assert any("assumed" in note for note in notes[checkpoint]) == (args is not ARGS)
    assert other_info.preprocessing.exact_size == (640, 640)
    pixels = torch.randn(2, 3, 64, 64)
    memory = other.encode(ImageBatch(pixels))
    [outputs] = other.decode(memory, [other.object_queries(memory)])
    theirs = model(pixels)
    assert_close(outputs.logits[-1], theirs.logits)
    assert_close(outputs.boxes_cxcywh[-1], theirs.pred_boxes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bbox_reparam": False}, "bbox_reparam is False, expected True"),
        ({"lite_refpoint_refine": False}, "lite_refpoint_refine is False"),
        ({"projector_scale": ["P4", "P6"]}, "projector_scale has P6"),
    ],
)
def test_what_ours_is_not_is_refused(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "lw-detr.pth"
    tensors = official(their_model(SMALL).state_dict())
    torch.save({"model": tensors, "args": Namespace(**{**ARGS, **changes})}, checkpoint)
    with pytest.raises(UserError, match=text):
        import_weights(checkpoint, tmp_path / "weights.safetensors", categories=NAMES)


def test_as_many_blocks_as_none_that_was_published_are_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "lw-detr.pth"
    tensors = official(their_model(TINY).state_dict())
    fewer = {name: x for name, x in tensors.items() if ".blocks.5." not in name}
    torch.save({"model": fewer, "args": Namespace(dropout=0)}, checkpoint)
    with pytest.raises(UserError, match="none of the published LW-DETRs has 5 blocks"):
        import_weights(checkpoint, tmp_path / "weights.safetensors", categories=NAMES)
