"""Official DINO checkpoints, and detrex's, import tensor by tensor; transformers has no DINO.

The names are those of the modules of IDEA-Research/DINO (``models/dino``) and of detrex
(``projects/dino``), which is built of detectron2's ResNet.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from official_checkpoints import (
    DECODER_LAYERS,
    HEADS,
    D,
    F,
    N,
    Shapes,
    deformable_parts,
    linear,
    mlp,
    norm,
    resnet18_state,
)
from torch import Tensor

from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.imports.settings import Unseen
from d3etr.detectors.weights import WeightsInfo, load_weights
from d3etr.errors import UserError
from d3etr.structures import ImageBatch

CLASSES = 7
CATEGORIES = tuple((index, f"LABEL_{index}") for index in range(CLASSES))


def shapes(stages: tuple[int, ...], levels: int) -> Shapes:
    yield from deformable_parts(stages, levels)
    yield from norm("transformer.decoder.norm")
    yield from mlp("transformer.decoder.ref_point_head", 2 * D, D, D)
    yield "transformer.tgt_embed.weight", (N, D)
    yield from linear("transformer.enc_output", D, D)
    yield from norm("transformer.enc_output_norm")
    yield from mlp("transformer.enc_out_bbox_embed", D, D, D, 4)
    yield from linear("transformer.enc_out_class_embed", CLASSES, D)
    yield "label_enc.weight", (CLASSES + 1, D)
    for index in range(DECODER_LAYERS):
        yield from linear(f"class_embed.{index}", CLASSES, D)
        yield from mlp(f"bbox_embed.{index}", D, D, D, 4)


def official_state(
    shared: bool = True, stages: tuple[int, ...] = (128, 256, 512), levels: int = 4
) -> dict[str, Tensor]:
    """Random tensors; heads are listed once for each layer and module that holds them."""
    torch.manual_seed(0)
    state = {f"backbone.0.body.{name}": x for name, x in resnet18_state().items()}
    for name, shape in shapes(stages, levels):
        state[name] = torch.randn(shape) / (shape[-1] if len(shape) > 1 else 10) ** 0.5
    for name in [name for name in state if name.startswith(("class_embed.", "bbox_embed."))]:
        if shared:
            state[name] = state[re.sub(r"embed\.\d+", "embed.0", name)]
        state[f"transformer.decoder.{name}"] = state[name]
    return state


def args(**changes: Any) -> Namespace:
    """What the official code was called with, as far as it matters here."""
    settings = {
        "nheads": HEADS,
        "dilation": False,
        "dropout": 0.0,
        "num_queries": N,
        "position_embedding": "sine",
        "pe_temperatureH": 20,
        "pe_temperatureW": 20,
        "enc_n_points": 4,
        "dec_n_points": 4,
        "transformer_activation": "relu",
        "two_stage_type": "standard",
        "decoder_sa_type": "sa",
        "decoder_module_seq": ["sa", "ca", "ffn"],
        "use_dn": True,
        "dn_number": 50,
        "dn_label_noise_ratio": 0.5,
        "dn_box_noise_scale": 0.4,
        "use_detached_boxes_dec_out": False,
    }
    return Namespace(**settings | changes)


def imported(
    folder: Path, state: dict[str, Tensor], settings: Namespace | None, heads: int | None = None
) -> tuple[DetectionTransformer, WeightsInfo, tuple[str, ...]]:
    source, target = folder / "theirs.pth", folder / "ours.safetensors"
    torch.save({"model": state} | ({} if settings is None else {"args": settings}), source)
    found = import_weights(source, target, Unseen(heads=heads), CATEGORIES)
    return *load_weights(target), found.notes


OURS = (
    (r"^backbone\.", "backbone.0.body."),
    (r"^levels\.projections\.", "input_proj."),
    (r"^position\.level$", "transformer.level_embed"),
    (r"^query_content\.", "transformer.tgt_embed."),
    (r"^proposals\.projection\.", "transformer.enc_output."),
    (r"^proposals\.norm\.", "transformer.enc_output_norm."),
    (r"^proposals\.class_head\.", "transformer.enc_out_class_embed."),
    (r"^proposals\.box_head\.", "transformer.enc_out_bbox_embed."),
    (r"^decoder\.class_heads\.", "class_embed."),
    (r"^decoder\.box_heads\.", "bbox_embed."),
    (r"^decoder\.position_head\.", "transformer.decoder.ref_point_head."),
    (r"^(encoder|decoder)\.", r"transformer.\1."),
    (r"\.feedforward\.inner\.", ".linear1."),
    (r"\.feedforward\.outer\.", ".linear2."),
    (r"^(transformer\.encoder.*)\.feedforward\.norm\.", r"\1.norm2."),
    (r"^(transformer\.encoder.*\d)\.norm\.", r"\1.norm1."),
    (r"^(transformer\.encoder.*)\.attention\.", r"\1.self_attn."),
    (r"\.cross_norm\.", ".norm1."),
    (r"\.self_norm\.", ".norm2."),
    (r"\.feedforward\.norm\.", ".norm3."),
    (r"\.self_attention\.", ".self_attn."),
    (r"\.cross_attention\.", ".cross_attn."),
    (r"\.offsets\.", ".sampling_offsets."),
    (r"\.weights\.", ".attention_weights."),
    (r"\.value\.", ".value_proj."),
    (r"self_attn\.output\.", "self_attn.out_proj."),
    (r"\.output\.", ".output_proj."),
)
"""The way back: from our names to the official ones, in order."""


def expected(name: str, state: dict[str, Tensor]) -> tuple[str, Tensor]:
    """The official tensor that ours of this name holds."""
    if name == "label_embedding.weight":  # its last row is of nothing
        return "label_enc.weight", state["label_enc.weight"] * (
            torch.arange(CLASSES + 1) < CLASSES
        ).unsqueeze(1)
    part = re.match(r"^decoder\.layers\.(\d)\.self_attention\.(query_key|value)\.(\w+)$", name)
    if part is not None:
        theirs = f"transformer.decoder.layers.{part[1]}.self_attn.in_proj_{part[3]}"
        rows = slice(2 * D) if part[2] == "query_key" else slice(2 * D, None)
        return theirs, state[theirs][rows]
    theirs = name
    for pattern, replacement in OURS:
        theirs = re.sub(pattern, replacement, theirs)
    if theirs.startswith("transformer.encoder"):
        theirs = theirs.replace("self_attn.out_proj", "self_attn.output_proj")
    return theirs, state[theirs]


@pytest.mark.parametrize("shared", [True, False])
def test_official_checkpoints_import_tensor_by_tensor(shared: bool, tmp_path: Path) -> None:
    state = official_state(shared)
    detector, info, _ = imported(tmp_path, state, args())
    config = info.detector
    assert config.name == "dino" and info.categories == CATEGORIES
    assert (config.levels, config.backbone_levels, config.points) == (4, 3, 4)
    assert (config.queries, config.feedforward, config.heads) == (N, F, HEADS)
    assert (config.grid_temperature, config.grid_centred) == (20, False)
    assert config.shared_heads == shared and config.learned_content and config.look_forward_twice
    assert (config.denoising.queries, config.denoising.box_noise) == (50, 0.4)
    used = set()
    for name, tensor in detector.state_dict().items():
        theirs, values = expected(name, state)
        assert torch.equal(tensor, values), name
        used.add(theirs)
    copies = r"^transformer\.decoder\.(class|bbox)_embed\."
    copies += r"|^(class|bbox)_embed\.[1-9]" if shared else ""
    assert {name for name in state if not re.match(copies, name)} == used
    memory = detector.encode(ImageBatch(torch.randn(1, 3, 64, 96)))
    [outputs] = detector.decode(memory, [detector.object_queries(memory)])
    assert outputs.logits.isfinite().all()


def test_five_scales_read_all_stages_of_the_backbone(tmp_path: Path) -> None:
    state = official_state(stages=(64, 128, 256, 512), levels=5)
    detector, info, notes = imported(tmp_path, state, None, HEADS)
    assert (info.detector.levels, info.detector.backbone_levels) == (5, 4)
    assert detector.level_strides == (4, 8, 16, 32, 64)
    assert any("temperature cannot be seen" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"two_stage_type": "no"}, "two_stage_type is 'no', expected 'standard'"),
        ({"decoder_sa_type": "ca_label"}, "decoder_sa_type is 'ca_label'"),
        ({"transformer_activation": "gelu"}, "transformer_activation is 'gelu'"),
        ({"pe_temperatureW": 10}, "pe_temperatureH is 20 and pe_temperatureW is 10"),
    ],
)
def test_other_variants_of_the_official_code_are_refused(
    changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=text):
        imported(tmp_path, official_state(), args(**changes))


def test_settings_that_training_alone_reads_are_kept(tmp_path: Path) -> None:
    settings = args(use_dn=False, dn_number=0, use_detached_boxes_dec_out=True)
    config = imported(tmp_path, official_state(), settings)[1].detector
    assert config.denoising.queries == 100 and not config.look_forward_twice


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    state = official_state()
    del state["transformer.decoder.norm.weight"]
    with pytest.raises(UserError, match=r"decoder\.norm\.weight"):
        imported(tmp_path, state, args())


BLOCKS = (
    (r"^backbone\.0\.body\.(conv|bn)1\.", r"backbone.stem.\g<1>1."),
    (r"^backbone\.0\.body\.layer(\d)\.", lambda match: f"backbone.res{int(match[1]) + 1}."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"^input_proj\.([0-2])\.0\.", r"neck.convs.\1.conv."),
    (r"^input_proj\.([0-2])\.1\.", r"neck.convs.\1.norm."),
    (r"^input_proj\.3\.0\.", "neck.extra_convs.0.conv."),
    (r"^input_proj\.3\.1\.", "neck.extra_convs.0.norm."),
    (r"\.level_embed$", ".level_embeds"),
    (r"^transformer\.enc_out_(class|bbox)_embed\.", rf"\1_embed.{DECODER_LAYERS}."),
    (r"\.linear1\.", ".ffns.0.layers.0.0."),
    (r"\.linear2\.", ".ffns.0.layers.1."),
    (r"(encoder\.layers\.\d)\.self_attn\.", r"\1.attentions.0."),
    (r"(encoder\.layers\.\d)\.norm1\.", r"\1.norms.0."),
    (r"(encoder\.layers\.\d)\.norm2\.", r"\1.norms.1."),
    (r"(decoder\.layers\.\d)\.self_attn\.", r"\1.attentions.0.attn."),
    (r"(decoder\.layers\.\d)\.cross_attn\.", r"\1.attentions.1."),
    (r"(decoder\.layers\.\d)\.norm2\.", r"\1.norms.0."),
    (r"(decoder\.layers\.\d)\.norm1\.", r"\1.norms.1."),
    (r"(decoder\.layers\.\d)\.norm3\.", r"\1.norms.2."),
)
"""From the official names to detrex's, in order."""


def test_detrex_checkpoints_hold_the_same_tensors(tmp_path: Path) -> None:
    official, theirs = official_state(shared=False), {}
    for name, tensor in official.items():
        for pattern, replacement in BLOCKS:
            name = re.sub(pattern, replacement, name)
        theirs[name] = tensor[:CLASSES] if name == "label_enc.weight" else tensor
        if re.match(r"(class|bbox)_embed\.", name):  # its first stage's heads are there, too
            theirs[f"transformer.decoder.{name}"] = tensor
    detector, info, _ = imported(tmp_path, theirs, None, HEADS)
    assert (info.detector.grid_temperature, info.detector.grid_centred) == (10_000, True)
    assert not info.detector.shared_heads
    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, expected(name, official)[1]), name
