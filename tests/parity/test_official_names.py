"""Official checkpoints give what Hugging Face's conversion of them gives.

Their rules for the official names are those of the conversion scripts that transformers 4 came
with (``convert_*_original_pytorch_checkpoint_to_pytorch.py``); what became of those names since is
applied by the installed transformers when it loads the folder.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from official_checkpoints import (
    DECODER_LAYERS,
    ENCODER_LAYERS,
    HEADS,
    KINDS,
    D,
    F,
    N,
    official_state,
)
from safetensors.torch import save_file
from torch import Tensor

from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.weights import load_weights
from d3etr.structures import ImageBatch

transformers = pytest.importorskip("transformers")
dab = pytest.importorskip("transformers.models.dab_detr.modeling_dab_detr")

CLASSES = 7
COMMON = {
    r"^transformer\.": "",
    r"\.linear(\d)\.": r".fc\1.",
    r"norm3": "final_layer_norm",
    r"^(encoder\..*)norm1": r"\1self_attn_layer_norm",
    r"^(encoder\..*)norm2": r"\1final_layer_norm",
}
SELF_FIRST = {r"norm1": "self_attn_layer_norm", r"norm2": "encoder_attn_layer_norm"}
ONE_LEVEL = {
    r"^input_proj\.": "input_projection.",
    r"^decoder\.norm\.": "decoder.layernorm.",
    r"^bbox_embed\.": "bbox_predictor.",
    r"^query_embed\.": "query_position_embeddings.",
    r"\.(multihead|cross)_attn\.": ".encoder_attn.",
}
CLASSIFIER = {r"^class_embed\.": "class_labels_classifier."}
RULES = {
    "detr": {**COMMON, **SELF_FIRST, **ONE_LEVEL, **CLASSIFIER},
    "conditional_detr": {**COMMON, **SELF_FIRST, **ONE_LEVEL, **CLASSIFIER},
    "deformable_detr": {
        **COMMON,
        r"norm1": "encoder_attn_layer_norm",
        r"norm2": "self_attn_layer_norm",
        r"^query_embed": "query_position_embeddings",
        r"\.cross_attn\.": ".encoder_attn.",
    },
    "dab_detr": {
        **COMMON,
        r"^bbox_embed\.": "bbox_predictor.",
        r"^input_proj\.": "input_projection.",
        r"^refpoint_embed\.": "query_refpoint_embeddings.",
        r"^decoder\.norm\.": "decoder.layernorm.",
        r"\.activation\.": ".activation_fn.",
        r"^(decoder\.layers\.\d+)\.(sa_|norm1|self_attn)": r"\1.self_attn.\2",
        r"^(decoder\.layers\.\d+)\.(ca_|norm2|cross_attn)": r"\1.cross_attn.\2",
        r"^(decoder\.layers\.\d+)\.(fc|final|activation)": r"\1.mlp.\2",
        r"(self|cross)_attn\.(self|cross)_attn\.out_proj": r"\1_attn.\2_attn.output_proj",
        r"self_attn\.norm1": "self_attn.self_attn_layer_norm",
        r"cross_attn\.norm2": "cross_attn.cross_attn_layer_norm",
        r"ca_qpos_sine_proj": "cross_attn_query_pos_sine_proj",
        r"sa_q(content|pos)_proj": r"self_attn_query_\1_proj",
        r"sa_k(content|pos)_proj": r"self_attn_key_\1_proj",
        r"sa_v_proj": "self_attn_value_proj",
        r"ca_q(content|pos)_proj": r"cross_attn_query_\1_proj",
        r"ca_k(content|pos)_proj": r"cross_attn_key_\1_proj",
        r"ca_v_proj": "cross_attn_value_proj",
    },
}
"""(pattern, replacement) by detector, applied in order."""
OUTSIDE = ("class_labels_classifier.", "bbox_predictor.", "class_embed.", "bbox_embed.")
"""What is not below ``model.``."""
TITLES = {
    "detr": "Detr",
    "conditional_detr": "ConditionalDetr",
    "dab_detr": "DabDetr",
    "deformable_detr": "DeformableDetr",
}


def _name(kind: str) -> str:
    return kind if kind in TITLES else "deformable_detr"


def _converted(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """By the rules of the conversion scripts."""
    converted: dict[str, Tensor] = {}
    for theirs, tensor in state.items():
        if theirs.startswith("backbone."):
            converted[_resnet(theirs.removeprefix("backbone.0.body."))] = tensor
            continue
        renamed = theirs
        for pattern, replacement in RULES[name].items():
            renamed = re.sub(pattern, replacement, renamed)
        if not renamed.startswith(OUTSIDE):
            renamed = f"model.{renamed}"
        match = re.match(r"(.*)in_proj_(weight|bias)$", renamed)
        if match is None:
            converted[renamed] = tensor
            continue
        for part, rows in zip("qkv", (slice(D), slice(D, 2 * D), slice(-D, None)), strict=True):
            converted[f"{match[1]}{part}_proj.{match[2]}"] = tensor[rows]
    return {key: tensor.clone() for key, tensor in converted.items()}


def _resnet(name: str) -> str:
    """Torchvision's names as those of Hugging Face's ResNet (timm's are torchvision's own)."""
    name = re.sub(r"^conv1\.", "embedder.embedder.convolution.", name)
    name = re.sub(r"^bn1\.", "embedder.embedder.normalization.", name)
    name = re.sub(r"downsample\.0\.", "shortcut.convolution.", name)
    name = re.sub(r"downsample\.1\.", "shortcut.normalization.", name)
    name = re.sub(
        r"^layer(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.", name
    )
    kinds = {"conv": "convolution", "bn": "normalization"}
    name = re.sub(r"\.(conv|bn)(\d)\.", lambda m: f".layer.{int(m[2]) - 1}.{kinds[m[1]]}.", name)
    return f"model.backbone.conv_encoder.model.{name}"


def _config(kind: str) -> Any:
    name, options = _name(kind), KINDS[kind][1]
    own: dict[str, Any] = {}
    stages = ["stage4"]
    if name == "deformable_detr":
        own = {
            "num_feature_levels": options.get("levels", 4),
            "with_box_refine": options.get("refined", False),
            "two_stage": options.get("two_stage", False),
            "two_stage_num_proposals": N,
        }
        stages = ["stage2", "stage3", "stage4"] if own["num_feature_levels"] > 1 else stages
    return getattr(transformers, f"{TITLES[name]}Config")(
        backbone_config=transformers.ResNetConfig(
            depths=[2, 2, 2, 2],
            hidden_sizes=[64, 128, 256, 512],
            layer_type="basic",
            out_features=stages,
        ),
        num_queries=N,
        encoder_layers=ENCODER_LAYERS,
        decoder_layers=DECODER_LAYERS,
        encoder_ffn_dim=F,
        decoder_ffn_dim=F,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        num_labels=CLASSES,
        **{"hidden_size" if name == "dab_detr" else "d_model": D},
        **own,
    )


def _write_folder(folder: Path, kind: str, tensors: dict[str, Tensor]) -> None:
    config = _config(kind).to_dict()
    config["architectures"] = [f"{TITLES[_name(kind)]}ForObjectDetection"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _args() -> Namespace:
    return Namespace(
        nheads=HEADS, dilation=False, dropout=0.1, num_queries=N, pre_norm=False, masks=False
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_official_checkpoints_equal_hugging_faces_conversion_of_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder = _name(kind), tmp_path / "theirs"
    state = official_state(kind, CLASSES, seed=1)
    torch.save({"model": state, "args": _args(), "epoch": 49}, tmp_path / "official.pth")
    _write_folder(folder, kind, _converted(state, name))
    categories = tuple((index, f"LABEL_{index}") for index in range(CLASSES))
    official = tmp_path / "official.safetensors"
    import_weights(tmp_path / "official.pth", official, categories=categories)
    import_weights(folder, tmp_path / "theirs.safetensors")
    ours, info = load_weights(official)
    other, other_info = load_weights(tmp_path / "theirs.safetensors")
    detector = info.detector
    if name == "dab_detr":
        epsilons = [part.detector.inverse_sigmoid_epsilon for part in (info, other_info)]
        assert epsilons == [1e-3, 1e-5]
        # All that the official DAB-DETR and Hugging Face's do differently.
        exact = partial(dab.inverse_sigmoid, eps=detector.inverse_sigmoid_epsilon)
        monkeypatch.setattr(dab, "inverse_sigmoid", exact)
        detector = detector.model_copy(update={"inverse_sigmoid_epsilon": 1e-5})
    assert detector == other_info.detector
    assert info.categories == other_info.categories
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key

    # Not only do both imports agree: so does what transformers makes of the folder.
    model, loading = getattr(transformers, f"{TITLES[name]}ForObjectDetection").from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(pixels, torch.ones(2, 64, 96, dtype=torch.long))
    memory = ours.encode(ImageBatch(pixels))
    (outputs,) = ours.decode(memory, [ours.object_queries(memory)])
    torch.testing.assert_close(outputs.boxes_cxcywh[-1], expected.pred_boxes, atol=1e-4, rtol=0)
    theirs = expected.logits
    if name == "detr":
        theirs = theirs.double().softmax(-1)[..., :-1].logit().float()
    torch.testing.assert_close(outputs.logits[-1], theirs, atol=1e-4, rtol=0)
    assert outputs.logits[-1].std(1).mean() > 1e-3
