"""One file holds a detector."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from d3etr.config import renamed
from d3etr.config.data import PreprocessingConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.weights import (
    FORMAT_KEY,
    INFO_KEY,
    WeightsInfo,
    file_digest,
    load_weights,
    read_info,
    save_weights,
    write_tensors,
)
from d3etr.errors import UserError
from d3etr.structures import ImageBatch


def _info(detector: DetectionTransformer) -> WeightsInfo:
    return WeightsInfo(
        detector=detector.config,
        categories=tuple((3 * index + 1, f"class {index}") for index in range(detector.classes)),
        preprocessing=PreprocessingConfig(normalisation="per_image", shortest_side=None),
        evaluation={"split": "validation", "mAP": 0.25, "digest": "ab"},
        origin={"seed": 3, "steps": [1, 2]},
    )


@pytest.fixture
def path(tmp_path: Path, conditional_detr: DetectionTransformer) -> Path:
    path = tmp_path / "new" / "weights.safetensors"
    save_weights(path, conditional_detr, _info(conditional_detr))
    return path


@torch.no_grad()
def test_a_detector_comes_back_bit_for_bit(
    path: Path, conditional_detr: DetectionTransformer
) -> None:
    loaded, info = load_weights(path)
    assert info == _info(conditional_detr) == read_info(path)
    assert not loaded.training
    images = ImageBatch(torch.randn(2, 3, 32, 32))
    before, after = (
        model.decode(model.encode(images), [model.object_queries()])[0]
        for model in (conditional_detr, loaded)
    )
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.boxes_cxcywh, after.boxes_cxcywh)


def test_half_precision_halves_the_file_and_loads_as_float32(
    path: Path, tmp_path: Path, conditional_detr: DetectionTransformer
) -> None:
    half = tmp_path / "half.safetensors"
    save_weights(half, conditional_detr, _info(conditional_detr), dtype=torch.float16)
    assert half.stat().st_size < 0.7 * path.stat().st_size
    loaded, _ = load_weights(half)
    for name, tensor in conditional_detr.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)


def test_values_that_half_precision_cannot_hold_are_refused(
    tmp_path: Path, conditional_detr: DetectionTransformer
) -> None:
    conditional_detr.projection.weight.data[0, 0] = 1e6
    path = tmp_path / "half.safetensors"
    with pytest.raises(UserError, match=r"projection\.weight.*float16"):
        save_weights(path, conditional_detr, _info(conditional_detr), dtype=torch.float16)
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_info_must_describe_the_detector(
    tmp_path: Path, conditional_detr: DetectionTransformer
) -> None:
    info = _info(conditional_detr).model_copy(update={"categories": ((1, "one"),)})
    with pytest.raises(ValueError, match="does not describe"):
        save_weights(tmp_path / "x.safetensors", conditional_detr, info)


def test_a_write_that_fails_keeps_the_old_file(
    path: Path, conditional_detr: DetectionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write.*weights\.safetensors.*no space"):
        save_weights(path, conditional_detr, _info(conditional_detr))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_digest_is_the_files_sha256(path: Path) -> None:
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("read", [load_weights, read_info])
def test_a_missing_file_is_named(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(UserError, match=r"nowhere\.safetensors does not exist"):
        read(tmp_path / "nowhere.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 200, -100])
def test_a_truncated_file_is_named(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"weights\.safetensors: not a whole safetensors file"):
        load_weights(path)


def test_another_format_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_weights(path)


def test_a_foreign_safetensors_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"not one of d3etr's"):
        load_weights(path)


def _rewrite(path: Path, **changes: str) -> None:
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    write_tensors(path, tensors, metadata | changes)


def test_another_format_version_is_named(path: Path) -> None:
    _rewrite(path, **{FORMAT_KEY: "99"})
    with pytest.raises(UserError, match=r"format version 99.*reads version 1"):
        load_weights(path)


@pytest.mark.parametrize("info", ["{", "{}", '{"detector": {"name": "other"}}'])
def test_broken_metadata_is_named(path: Path, info: str) -> None:
    _rewrite(path, **{INFO_KEY: info})
    with pytest.raises(UserError, match=f"{INFO_KEY}' metadata is broken"):
        load_weights(path)


def test_a_file_with_keys_of_an_earlier_version_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = {"student.detector.hidden": "student.detector.width", "data.preprocessing.cut": None}
    monkeypatch.setattr(renamed, "EARLIER_KEYS", earlier)
    today = read_info(path)
    info = json.loads(today.model_dump_json())
    info["detector"]["hidden"] = info["detector"].pop("width")
    info["preprocessing"]["cut"] = 3
    _rewrite(path, **{INFO_KEY: json.dumps(info)})
    assert read_info(path) == today


def test_tensors_of_another_architecture_are_named(path: Path) -> None:
    info = json.loads(read_info(path).model_dump_json())
    info["detector"]["encoder_layers"] = 1
    info["detector"]["queries"] = 7
    _rewrite(path, **{INFO_KEY: json.dumps(info)})
    with pytest.raises(UserError) as caught:
        load_weights(path)
    for part in (str(path), "left over: encoder.layers.1", "query_embedding.weight ([6, 32]"):
        assert part in str(caught.value)
