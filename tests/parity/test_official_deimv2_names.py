"""Official checkpoints of DEIMv2: names, and what the official code computes of them.

It is not what transformers (5.23) computes: its model is changed into the official one here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_d_fine_parity import CLASSES, imported, require_equal
from test_deimv2_parity import VARIANTS, their_model
from test_hgnet import OFFICIAL as NETWORK
from test_official_d_fine_names import ENCODER_LAYERS
from test_official_d_fine_names import HEADS as D_FINE_HEADS
from test_official_rt_detr_names import under_official_names
from torch import Tensor, nn
from transformers.models.deimv2.modeling_deimv2 import Deimv2MLP

from d3etr.detectors.deimv2 import DEIMv2
from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.imports.layouts import official_detector
from d3etr.detectors.imports.settings import Unseen
from d3etr.detectors.weights import load_weights
from d3etr.errors import UserError

ENCODER = (
    (r"^model\.encoder\.aifi\.0\.", "encoder.encoder.0."),
    (r"^model\.conv_encoder\.encoder_input_proj\.", "encoder.input_proj."),
    (r"^model\.encoder\.", "encoder."),
    (r"\.down_conv(\d)\.conv\.", r".down_sample\1.1."),
    (r"\.down_conv(\d)\.norm\.", r".down_sample\1.2."),
    (r"\.bi_fusion_conv\.", ".bi_fusion.cv."),
    (r"(_blocks\.\d|_block)\.conv1\.", r"\1.cv1."),
    (r"(_blocks\.\d|_block)\.conv2\.", r"\1.cv4."),
    (r"\.csp_rep1\.conv2\.", ".cv2.1."),
    (r"\.csp_rep2\.conv2\.", ".cv3.1."),
    (r"\.csp_rep1\.", ".cv2.0."),
    (r"\.csp_rep2\.", ".cv3.0."),
    *ENCODER_LAYERS,
)
HEADS = (
    (r"^model\.decoder_input_proj\.", "decoder.input_proj."),
    (r"\.mlp\.gate_up\.", ".swish_ffn.w12."),
    (r"\.mlp\.down_proj\.", ".swish_ffn.w3."),
    *D_FINE_HEADS,
    (r"^(decoder\.decoder\.layers\..*norm\d?)\.weight$", r"\1.scale"),
)
VIT = (
    (r"^conv_encoder\.fusion_proj\.(\d)\.conv\.", r"convs.\1."),
    (r"^conv_encoder\.fusion_proj\.(\d)\.norm\.", r"norms.\1."),
    (r"^conv_encoder\.spatial_tuning_adapter\.", "sta."),
    (r"^sta\.stem_conv\.", "sta.stem."),
    (r"^sta\.(stem|conv2)\.conv\.", r"sta.\1.0."),
    (r"^sta\.(stem|conv2)\.norm\.", r"sta.\1.1."),
    (r"^sta\.(conv[34])\.conv\.", r"sta.\1.1."),
    (r"^sta\.(conv[34])\.norm\.", r"sta.\1.2."),
    (r"^conv_encoder\.backbone\.(embeddings\.)?(model\.)?", "dinov3."),
    (r"\.register_tokens$", ".storage_tokens"),
    (r"\.patch_embeddings\.", ".patch_embed.proj."),
    (r"^dinov3\.layer\.", "dinov3.blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
)
GATED = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}
PLAIN = {"up_proj": "fc1", "down_proj": "fc2"}
FIRST_STAGE = "model.enc_output."
"""What the official code does not have."""


def official_name(name: str) -> str:
    """What the official code calls a tensor of transformers'."""
    rules, begins = HEADS, ""
    if name.startswith("model.conv_encoder.model."):
        name, rules, begins = name.removeprefix("model.conv_encoder.model."), NETWORK, "backbone."
    elif name.startswith(("model.encoder", "model.conv_encoder.encoder")):
        rules = ENCODER
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return begins + name


def official_vit(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A DINOv3 with its adapter and projections under official names.

    Without registers it is the plainer network, which neither scales nor norms.
    """
    gated = any(".mlp.gate_proj." in name for name in theirs)
    plain = not theirs["conv_encoder.backbone.embeddings.register_tokens"].numel()
    state: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        for pattern, replacement in VIT:
            name = re.sub(pattern, replacement, name)
        for part, official in (GATED if gated else PLAIN).items():
            name = name.replace(f".mlp.{part}.", f".mlp.{official}.")
        if plain and re.search(r"\.ls\d\.|dinov3\.norm\.|_tokens?$", name) and "cls" not in name:
            continue
        state[name] = tensor[0] if name.endswith("mask_token") else tensor
    for name in [name for name in state if ".attn.q_proj." in name]:
        names = [name.replace(".q_proj.", f".{x}_proj.") for x in "qkv"]
        query = state[name]
        parts = [state.pop(x, torch.zeros_like(query)) for x in names]
        state[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
        if name.endswith(".bias") and not plain:
            mask = torch.ones(3, len(query))
            mask[1] = 0.0
            state[name.replace(".q_proj.bias", ".qkv.bias_mask")] = mask.flatten()
    if plain:
        state = {name.replace("dinov3.", "dinov3._model."): x for name, x in state.items()}
    periods = "dinov3._model.rope_embed.periods" if plain else "dinov3.rope_embed.periods"
    return {f"backbone.{name}": x for name, x in {**state, periods: torch.ones(16)}.items()}


def official_state(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under official names; the two maps of gated feed-forward blocks in one tensor."""
    own = {name: tensor for name, tensor in theirs.items() if not name.startswith(FIRST_STAGE)}
    vit = {
        name.removeprefix("model."): own.pop(name)
        for name in [*own]
        if re.match(r"model\.conv_encoder\.(backbone|spatial|fusion)", name)
    }
    for name in [name for name in own if ".mlp.gate_proj." in name]:
        parts = [own.pop(name.replace("gate_proj", part)) for part in ("gate_proj", "up_proj")]
        own[name.replace("gate_proj", "gate_up")] = torch.cat(parts)
    state = under_official_names(own, official_name)
    return {
        **state,
        **(official_vit(vit) if vit else {}),
        "decoder.decoder.up": state["decoder.up"],
        "decoder.decoder.reg_scale": state["decoder.reg_scale"],
        "backbone.stem.stem1.bn.num_batches_tracked": torch.tensor(7),
    }


class Once(nn.Module):
    """Embeds the first boxes of a pass; later layers get the same.

    Args:
        head: their query_pos_head.
        decoder: whose passes count.
    """

    def __init__(self, head: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.found: Tensor | None = None
        decoder.register_forward_pre_hook(self.begin)

    def begin(self, *_: Any) -> None:
        self.found = None

    def forward(self, boxes: Tensor) -> Tensor:
        self.found = self.head(boxes) if self.found is None else self.found
        return self.found


def make_official(model: Any) -> None:
    """Nothing before the first stage's heads, silu in all heads, boxes embedded once.

    The plainer network below S and M has no norm.
    """
    model.model.enc_output = nn.Identity()
    network = getattr(model.model.conv_encoder, "backbone", None)
    if network is not None and not network.config.apply_layernorm:
        network.norm = nn.Identity()
    for name, module in model.named_modules():
        if isinstance(module, Deimv2MLP) and ".aifi." not in name:
            module.act = nn.SiLU()
    decoder = model.model.decoder
    decoder.query_pos_head = Once(decoder.query_pos_head, decoder)


EXPECTED = {
    "N": (
        *("backbone.stem.stem2b.lab.scale", "encoder.input_proj.1.conv.weight"),
        "encoder.encoder.0.layers.0.self_attn.in_proj_weight",
        "encoder.pan_blocks.0.cv2.0.bottlenecks.0.conv2.norm.running_mean",
        *("encoder.fpn_blocks.0.cv3.1.conv.weight", "encoder.fpn_blocks.0.cv2.0.conv1.norm.bias"),
        *("encoder.downsample_convs.0.0.cv2.norm.bias", "encoder.lateral_convs.0.conv.weight"),
        "decoder.decoder.layers.1.gateway.gate.weight",
        *("decoder.decoder.layers.2.gateway.norm.scale", "decoder.decoder.layers.0.norm1.scale"),
        *("decoder.decoder.layers.0.norm3.scale", "decoder.query_pos_head.layers.2.weight"),
        *(f"decoder.decoder.layers.0.swish_ffn.{x}" for x in ("w12.weight", "w3.bias")),
        "decoder.decoder.layers.0.cross_attn.num_points_scale",
        *("decoder.decoder.lqe_layers.2.reg_conf.layers.1.weight", "decoder.enc_score_head.bias"),
        *("decoder.pre_bbox_head.layers.2.bias", "decoder.dec_bbox_head.2.layers.2.weight"),
    ),
    "Atto": (
        *("encoder.input_proj.0.conv.weight", "encoder.down_sample1.1.weight"),
        *("encoder.down_sample2.2.running_var", "encoder.bi_fusion.cv.norm.weight"),
        *("encoder.fpn_block.cv2.0.conv1.conv.weight", "encoder.pan_block.cv3.1.conv.weight"),
        *("decoder.decoder.layers.0.norm2.scale", "decoder.dec_bbox_head.2.layers.0.weight"),
    ),
    "S: DINOv3 without registers": (
        *("backbone.dinov3._model.cls_token", "backbone.dinov3._model.patch_embed.proj.bias"),
        *(f"backbone.dinov3._model.blocks.2.{x}.weight" for x in ("norm1", "mlp.fc1", "mlp.fc2")),
        *("backbone.dinov3._model.blocks.0.attn.qkv.bias", "backbone.sta.stem.0.weight"),
        *("backbone.sta.stem.1.running_mean", "backbone.sta.conv2.1.weight"),
        *("backbone.sta.conv3.1.weight", "backbone.sta.conv4.2.bias", "backbone.convs.2.weight"),
        *("backbone.norms.1.running_var", "encoder.fpn_blocks.1.cv3.0.conv1.conv.weight"),
    ),
    "X: registers and gated blocks": (
        *("backbone.dinov3.storage_tokens", "backbone.dinov3.mask_token"),
        *("backbone.dinov3.norm.weight", "backbone.dinov3.blocks.3.ls2.gamma"),
        *(f"backbone.dinov3.blocks.1.mlp.w{k}.weight" for k in (1, 2, 3)),
        *("backbone.dinov3.blocks.0.attn.qkv.weight", "backbone.dinov3.blocks.0.attn.proj.bias"),
        "backbone.dinov3.blocks.0.attn.qkv.bias_mask",
    ),
}
"""Some of their names, so that what the rules above make of names is what the code has."""


@pytest.mark.parametrize("variant", EXPECTED)
@torch.no_grad()
def test_official_checkpoints_compute_as_the_official_code(variant: str, tmp_path: Path) -> None:
    model = their_model(VARIANTS[variant])
    for name, tensor in model.state_dict().items():
        if name.endswith("attention.k_proj.bias"):  # masked there
            tensor.zero_()
        if name.endswith("lambda1") and variant.startswith("S:"):  # none there
            tensor.fill_(1.0)
    expected, _ = imported(model, tmp_path)
    state = official_state(model.state_dict())
    assert official_detector(state) == "deimv2"
    assert {name.split(".")[0] for name in state} == {"backbone", "encoder", "decoder"}
    assert not {*EXPECTED[variant]} - state.keys()
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    checkpoint = {"model": wrong, "ema": {"module": state, "updates": 7}, "last_epoch": 71}
    torch.save(checkpoint, tmp_path / "official.pth")
    categories = tuple((index, f"LABEL_{index}") for index in range(CLASSES))
    target = tmp_path / "official.safetensors"
    import_weights(tmp_path / "official.pth", target, None, categories)
    detector, info = load_weights(target)
    assert isinstance(detector, DEIMv2)
    unseen = {"queries", "denoising", "encoder_feedforward"}
    own = {"implementation": "official", "activation": "silu"}
    found = expected.config.model_copy(update=own).model_dump(exclude=unseen)
    vit = found["backbone"]["dinov3"]
    if variant.startswith("S:"):
        vit |= {"normed": "none", "key_bias": True}
    assert detector.config.model_dump(exclude=unseen) == found
    assert info.preprocessing.exact_size == (640, 640)
    over_vit = found["backbone"]["name"] == "dinov3"
    assert info.preprocessing.normalisation == ("imagenet" if over_vit else "unit")
    tensors = expected.state_dict()
    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, tensors.get(name, torch.zeros_like(tensor))), name
    make_official(model)
    detector.proposals.queries = 11  # of 300, which no tensor shows
    require_equal(detector.eval(), model, torch.randn(2, 3, *VARIANTS[variant].image))


@pytest.mark.parametrize(
    ("ends", "tensor", "text"),
    [
        ("dinov3._model.cls_token", None, "no tensor 'backbone.class_token'"),
        ("blocks.0.mlp.fc2.weight", torch.zeros(3), "'backbone.blocks.0.outer.weight'"),
        ("sta.stem.0.weight", None, "'backbone.details.0.conv.weight'"),
        ("fpn_blocks.0.cv2.0.conv1.conv.weight", torch.zeros(3, 1), "has no halves"),
        ("fpn_blocks.0.cv2.0.conv1.norm.weight", torch.zeros(()), "has no halves"),
        ("swish_ffn.w3.bias", torch.zeros(5), "feedforward.outer.bias"),
    ],
)
def test_broken_checkpoints_are_refused(
    ends: str, tensor: Tensor | None, text: str, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    changed = {name: x for name, x in state.items() if not name.endswith(ends)}
    broken = {name: tensor for name in state if name.endswith(ends) and tensor is not None}
    assert len(changed) < len(state)
    torch.save(changed | broken, tmp_path / "official.pth")
    categories = tuple((index, f"LABEL_{index}") for index in range(CLASSES))
    with pytest.raises(UserError, match=text):
        import_weights(tmp_path / "official.pth", tmp_path / "ours.safetensors", None, categories)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return official_state(their_model(VARIANTS["S: DINOv3 without registers"]).state_dict())


@pytest.mark.parametrize(("width", "side", "queries"), [(64, 320, 100), (96, 416, 150)])
def test_small_sizes_see_the_images_that_they_were_published_with(
    width: int, side: int, queries: int, tmp_path: Path
) -> None:
    sizes = {"encoder_hidden_dim": width, "d_model": width}
    model = their_model(VARIANTS["Atto"], **sizes, decoder_in_channels=[width] * 2)
    torch.save(official_state(model.state_dict()), tmp_path / "official.pth")
    categories = tuple((index, f"LABEL_{index}") for index in range(CLASSES))
    target = tmp_path / "ours.safetensors"
    result = import_weights(tmp_path / "official.pth", target, None, categories)
    assert result.architecture["queries"] == queries
    assert f"images of {side} x {side} and {queries} queries are assumed" in result.notes[0]
    assert load_weights(target)[1].preprocessing.exact_size == (side, side)
    result = import_weights(
        tmp_path / "official.pth", target, Unseen(activation="relu"), categories
    )
    assert result.architecture["activation"] == "relu"
