"""State dicts under the names that the official training codes give their tensors.

The names are those of the modules in facebookresearch/detr, Atten4Vis/ConditionalDETR,
IDEA-Research/DAB-DETR and fundamentalvision/Deformable-DETR, as Hugging Face's conversion scripts
(transformers 4, ``models/*/convert_*_to_pytorch.py``) list them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torchvision
from torch import Tensor

D, F, N, ENCODER_LAYERS, DECODER_LAYERS, HEADS, POINTS, LEVELS = 32, 48, 11, 2, 3, 4, 4, 4
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def linear(name: str, out: int, into: int) -> Shapes:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def norm(name: str, width: int = D) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def mlp(name: str, *widths: int) -> Shapes:
    for index, (into, out) in enumerate(pairwise(widths)):
        yield from linear(f"{name}.layers.{index}", out, into)


def multihead(name: str) -> Shapes:
    yield f"{name}.in_proj_weight", (3 * D, D)
    yield f"{name}.in_proj_bias", (3 * D,)
    yield from linear(f"{name}.out_proj", D, D)


def deformable_attention(name: str, levels: int) -> Shapes:
    yield from linear(f"{name}.sampling_offsets", HEADS * levels * POINTS * 2, D)
    yield from linear(f"{name}.attention_weights", HEADS * levels * POINTS, D)
    yield from linear(f"{name}.value_proj", D, D)
    yield from linear(f"{name}.output_proj", D, D)


def layer(name: str, norms: int, slope: bool = False) -> Shapes:
    yield from linear(f"{name}.linear1", F, D)
    yield from linear(f"{name}.linear2", D, F)
    for index in range(norms):
        yield from norm(f"{name}.norm{index + 1}")
    if slope:
        yield f"{name}.activation.weight", (1,)


def plain_encoder(slope: bool = False) -> Shapes:
    for index in range(ENCODER_LAYERS):
        name = f"transformer.encoder.layers.{index}"
        yield from multihead(f"{name}.self_attn")
        yield from layer(name, 2, slope)


def one_level(outputs: int) -> Shapes:
    yield "input_proj.weight", (D, 512, 1, 1)
    yield "input_proj.bias", (D,)
    yield from linear("class_embed", outputs, D)
    yield from mlp("bbox_embed", D, D, D, 4)


def detr(outputs: int) -> Shapes:
    yield from plain_encoder()
    for index in range(DECODER_LAYERS):
        name = f"transformer.decoder.layers.{index}"
        yield from multihead(f"{name}.self_attn")
        yield from multihead(f"{name}.multihead_attn")
        yield from layer(name, 3)
    yield from norm("transformer.decoder.norm")
    yield from one_level(outputs + 1)
    yield "query_embed.weight", (N, D)


def conditional_layers(slope: bool = False) -> Shapes:
    apart = ("qcontent", "qpos", "kcontent", "kpos")
    for index in range(DECODER_LAYERS):
        name = f"transformer.decoder.layers.{index}"
        kinds = [f"sa_{part}_proj" for part in apart] + ["sa_v_proj"]
        kinds += [f"ca_{part}_proj" for part in apart if index == 0 or part != "qpos"]
        for kind in [*kinds, "ca_v_proj", "ca_qpos_sine_proj"]:
            yield from linear(f"{name}.{kind}", D, D)
        yield from linear(f"{name}.self_attn.out_proj", D, D)
        yield from linear(f"{name}.cross_attn.out_proj", D, D)
        yield from layer(name, 3, slope)
    yield from norm("transformer.decoder.norm")
    yield from mlp("transformer.decoder.query_scale", D, D, D)


def conditional_detr(outputs: int) -> Shapes:
    yield from plain_encoder()
    yield from conditional_layers()
    yield from mlp("transformer.decoder.ref_point_head", D, D, 2)
    yield from one_level(outputs)
    yield "query_embed.weight", (N, D)


def dab_detr(outputs: int) -> Shapes:
    yield from plain_encoder(slope=True)
    yield from mlp("transformer.encoder.query_scale", D, D, D)
    yield from conditional_layers(slope=True)
    yield from mlp("transformer.decoder.ref_point_head", 2 * D, D, D)
    yield from mlp("transformer.decoder.ref_anchor_head", D, D, 2)
    yield from one_level(outputs)
    yield "refpoint_embed.weight", (N, 4)


def deformable_parts(stages: Sequence[int], levels: int) -> Shapes:
    """Layers of encoder and decoder, and what makes levels of the backbone's stages."""
    yield "transformer.level_embed", (levels, D)
    for part, depth in (("encoder", ENCODER_LAYERS), ("decoder", DECODER_LAYERS)):
        for index in range(depth):
            name = f"transformer.{part}.layers.{index}"
            deformable = "self_attn" if part == "encoder" else "cross_attn"
            yield from deformable_attention(f"{name}.{deformable}", levels)
            if part == "decoder":
                yield from multihead(f"{name}.self_attn")
            yield from layer(name, 2 if part == "encoder" else 3)
    for index in range(levels):
        further = index - len(stages)
        into = stages[index] if further < 0 else stages[-1] if further == 0 else D
        kernel = 1 if further < 0 else 3
        yield f"input_proj.{index}.0.weight", (D, into, kernel, kernel)
        yield f"input_proj.{index}.0.bias", (D,)
        yield from norm(f"input_proj.{index}.1")


def deformable_detr(
    outputs: int, *, levels: int = LEVELS, refined: bool = False, two_stage: bool = False
) -> Shapes:
    yield from deformable_parts((128, 256, 512) if levels > 1 else (512,), levels)
    for index in range(DECODER_LAYERS + two_stage):
        yield from linear(f"class_embed.{index}", outputs, D)
        yield from mlp(f"bbox_embed.{index}", D, D, D, 4)
    if two_stage:
        yield from linear("transformer.enc_output", D, D)
        yield from norm("transformer.enc_output_norm")
        yield from linear("transformer.pos_trans", 2 * D, 2 * D)
        yield from norm("transformer.pos_trans_norm", 2 * D)
    else:
        yield "query_embed.weight", (N, 2 * D)
        yield from linear("transformer.reference_points", 2, D)


KINDS = {
    "detr": (detr, {}),
    "conditional_detr": (conditional_detr, {}),
    "dab_detr": (dab_detr, {}),
    "deformable_detr": (deformable_detr, {}),
    "deformable-one-level": (deformable_detr, {"levels": 1}),
    "deformable-refined": (deformable_detr, {"refined": True}),
    "deformable-two-stage": (deformable_detr, {"refined": True, "two_stage": True}),
}
"""What tells the variants apart."""


def official_state(kind: str, outputs: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of an official detector with a ResNet-18, large enough to matter.

    Args:
        kind: a key of ``KINDS``.
        outputs: slots of the class head, without DETR's "no object".
        seed: of the tensors.
    """
    torch.manual_seed(seed)
    make, options = KINDS[kind]
    state = {f"backbone.0.body.{name}": x for name, x in resnet18_state().items()}
    state |= {name: _random(name, shape) for name, shape in make(outputs, **options)}
    if kind == "dab_detr":
        _share(state, r"bbox_embed.", "transformer.decoder.bbox_embed.")
    if make is deformable_detr:
        _share_heads(state, options.get("refined", False), options.get("two_stage", False))
    return state


def resnet18_state() -> dict[str, Tensor]:
    """Torchvision's tensors, without classifier and counters, with random statistics."""
    whole = torchvision.models.resnet18(weights=None).state_dict()
    state = {n: x for n, x in whole.items() if "fc." not in n and "num_batches" not in n}
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif "bn" in name or "downsample.1" in name:
            tensor.add_(0.1 * torch.randn_like(tensor))
    return state


def _share_heads(state: dict[str, Tensor], refined: bool, two_stage: bool) -> None:
    """The official code holds shared heads once for each layer, and refined ones twice."""
    for name in list(state):
        head, _, rest = name.partition(".0.")
        if head in ("class_embed", "bbox_embed") and not refined:
            state |= {f"{head}.{index}.{rest}": state[name] for index in range(DECODER_LAYERS)}
    if refined:
        _share(state, "bbox_embed.", "transformer.decoder.bbox_embed.")
    if two_stage:
        _share(state, "class_embed.", "transformer.decoder.class_embed.")


def _share(state: dict[str, Tensor], prefix: str, copy: str) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[copy + name.removeprefix(prefix)] = state[name]


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith(("query_embed.weight", "refpoint_embed.weight", "level_embed")):
        return torch.randn(shape)
    if len(shape) > 1:
        scale = 0.5 if "sampling_offsets" in name else 1.0
        fan_in = torch.tensor(shape[1:]).prod().item()
        return torch.randn(shape) * scale * fan_in**-0.5
    one = name.endswith("weight") and ("norm" in name or ".1." in name)
    return 0.05 * torch.randn(shape) + (1.0 if one else 0.25 if "activation" in name else 0.0)
