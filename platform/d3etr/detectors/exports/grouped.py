"""What transformers has to know of LW-DETR and RF-DETR, and what it has no setting for."""

from __future__ import annotations

from typing import Any

from d3etr.config.data import PreprocessingConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.grouped import GroupedConfig

_KINDS = {"rf_detr": "dinov2", "lw_detr": "lw_detr"}
"""Kind of the vision transformer below each detector."""


def settings(config: GroupedConfig, detector: DetectionTransformer) -> dict[str, Any]:
    """Of ``config.json``, but backbone and labels."""
    found: dict[str, Any] = {
        "model_type": config.name,
        "d_model": config.width,
        "num_queries": config.queries,
        "group_detr": config.groups,
        "decoder_layers": config.decoder_layers,
        "decoder_ffn_dim": config.feedforward,
        "decoder_self_attention_heads": config.heads,
        "decoder_cross_attention_heads": config.cross_heads,
        "decoder_n_points": config.points,
        "hidden_expansion": config.expansion,
        "c2f_num_blocks": config.projector_blocks,
        "dropout": config.dropout,
    }
    if config.name == "lw_detr":
        found["projector_scale_factors"] = list(config.scales)
    return found


def backbone(config: GroupedConfig) -> dict[str, Any]:
    """Of ``backbone_config``, of a configuration without ``problems``."""
    vit = config.backbone.vit
    shared = {
        "hidden_size": vit.width,
        "num_hidden_layers": vit.blocks,
        "num_attention_heads": vit.heads,
        "mlp_ratio": vit.expansion,
        "patch_size": vit.patch,
        "out_indices": list(vit.outputs),
    }
    side = vit.positions * vit.patch
    if vit.kind == "dinov2":
        more = {"num_register_tokens": 0, "image_size": side, "num_windows": vit.windows}
        return {"model_type": "rf_detr_dinov2", **shared, **more}
    within = [k for k in range(vit.blocks) if vit.windows > 1 and k not in vit.whole]
    return {
        "model_type": "lw_detr_vit",
        **shared,
        "pretrain_image_size": side,
        "image_size": vit.windows**3 * vit.patch,  # of no effect, but for what divides it
        "num_windows": vit.windows**2,
        "window_block_indices": within,
    }


def problems(config: GroupedConfig) -> list[str]:
    """What transformers has no setting for, and what to do about it."""
    network, kind = config.backbone, _KINDS[config.name]
    if network.name != "vit" or network.vit.kind != kind:
        return [
            f"the backbone is '{network.name}', and only 'vit' of kind '{kind}' is its: distil "
            "into a detector over one"
        ]
    found, vit = [], network.vit
    if config.name == "rf_detr" and config.scales != (1.0,):
        found.append(f"its scales are {list(config.scales)}, theirs [1]: train one with those")
    whole = tuple(k for k in vit.outputs if k < vit.blocks) if vit.windows > 1 else ()
    if kind == "dinov2" and vit.whole != whole:
        found.append(
            f"blocks {list(vit.whole)} of its backbone attend over the whole image, of theirs "
            f"those whose numbers are among the outputs, {list(whole)}: train one with these"
        )
    return found


def problems_of_sizes(config: GroupedConfig, preprocessing: PreprocessingConfig) -> list[str]:
    """Sizes of images that theirs cannot take, or reads in another way."""
    vit, size = config.backbone.vit, preprocessing.exact_size
    cell = vit.patch * vit.windows
    square = vit.kind == "dinov2" and vit.windows > 1
    shape = "a square" if square else "one"
    if size is not None and not any(side % cell for side in size):
        if not square or size[0] == size[1]:
            return []
    found = "none" if size is None else f"{size[0]} x {size[1]}"
    return [
        f"its exact_size is {found}, and theirs takes {shape} of multiples of {cell} only: train "
        "on with such a data.preprocessing.exact_size"
    ]
