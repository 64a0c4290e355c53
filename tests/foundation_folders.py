"""Folders of tiny foundation models with random weights, as transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def write_folder(folder: Path, kind: str = "dinov2", licence: str | None = "apache-2.0") -> Path:
    """A folder with all files; ``kind`` is transformers' ``model_type``."""
    from transformers import AutoConfig, AutoModel

    settings = dict(SIZES)
    if kind == "dinov3_vit":
        settings |= {"intermediate_size": 32}
    if kind != "dinov2":
        settings |= {"num_register_tokens": 3}
    torch.manual_seed(5)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token" in name or "bias" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    images = {"image_mean": MEAN, "image_std": STD, "do_rescale": True, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    if licence is not None:
        card = f"---\nlicense: {licence}\ntags:\n- dino\n---\n# A model\n"
        (folder / "README.md").write_text(card)
    return folder
