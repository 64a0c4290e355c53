"""Official RF-DETR checkpoints import as Hugging Face's folders of the same tensors."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_grouped_parity import CLASSES, DINOV2, Variant, assert_close, their_model

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.imports.importing import import_weights
from d3etr.detectors.imports.settings import Unseen
from d3etr.detectors.weights import load_weights
from d3etr.errors import UserError
from d3etr.structures import ImageBatch

transformers = pytest.importorskip("transformers")

NAMES = tuple((number, f"LABEL_{number}") for number in range(CLASSES))
NEW = Variant(
    "rf_detr",
    {
        **DINOV2,
        "hidden_size": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 4,
        "num_windows": 3,
        "out_indices": [1, 3],
    },
    {},
)
NEW_ARGS: Mapping[str, Any] = {
    "sa_nheads": 4,
    "ca_nheads": 8,
    "num_windows": 3,
    "out_feature_indexes": [1, 3],
    "resolution": 72,
    "dropout": 0,
    "projector_scale": ["P4"],
}
OLD = Variant(
    "rf_detr",
    {
        **DINOV2,
        "hidden_size": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 12,
        "num_windows": 4,
        "out_indices": [2, 5, 8, 11],
        "patch_size": 14,
        "image_size": 70,
    },
    {},
    {"decoder_self_attention_heads": 1, "decoder_cross_attention_heads": 2},
)


@pytest.mark.parametrize(
    ("variant", "args", "side"),
    [(NEW, NEW_ARGS, 72), (OLD, {"dropout": 0}, 112)],
    ids=["args", "none"],
)
@torch.no_grad()
def test_checkpoints_and_folders_give_the_same(
    variant: Variant, args: Mapping[str, Any], side: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, folder = their_model(variant), tmp_path / "folder"
    model.save_pretrained(folder)
    transformers.RfDetrImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert "transformer.decoder.layers.0.self_attn.in_proj_weight" in tensors
    checkpoint = tmp_path / "rf-detr.pth"
    torch.save({"model": tensors, "args": Namespace(**args)}, checkpoint)
    found = {}
    for source, names in ((folder, None), (checkpoint, NAMES)):
        target = tmp_path / f"{source.stem}.safetensors"
        imported = import_weights(source, target, categories=names)
        assert any("behind the last features" in note for note in imported.notes)
        found[source] = load_weights(target), imported
    (ours, info), (other, other_info) = (weights for weights, _ in found.values())
    assert isinstance(info.detector, DetectorConfig) and info.detector == other_info.detector
    expected = other.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    assumed = [note for note in found[checkpoint][1].notes if "assumed" in note]
    assert bool(assumed) == (variant is OLD)
    assert info.preprocessing.exact_size == (side, side)
    assert other_info.preprocessing.exact_size == ((560, 560) if variant is OLD else (side, side))
    pixels = torch.randn(2, 3, side, side)
    memory = ours.encode(ImageBatch(pixels))
    [outputs] = ours.decode(memory, [ours.object_queries(memory)])
    theirs = model(pixels)
    assert_close(outputs.logits[-1], theirs.logits)
    assert_close(outputs.boxes_cxcywh[-1], theirs.pred_boxes)


def test_options_that_it_has_not_are_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "rf-detr.pth"
    sign = "backbone.0.encoder.encoder.embeddings.cls_token"
    torch.save({"model": {sign: torch.zeros(1, 1, 4)}, "args": Namespace()}, checkpoint)
    target = tmp_path / "weights.safetensors"
    with pytest.raises(UserError, match="--dilation would have no effect: rf_detr has no such"):
        import_weights(checkpoint, target, Unseen(dilation=True), NAMES)
    with pytest.raises(UserError, match=r"no tensor 'decoder\.norm\.weight'"):
        import_weights(checkpoint, target, categories=NAMES)
