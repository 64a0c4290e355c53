"""Exporting weights: the same detector in half the space, and what other formats cannot say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d3etr.cli.main import main
from d3etr.config.backbone import BackboneConfig
from d3etr.config.data import PreprocessingConfig
from d3etr.config.detector import detector_config
from d3etr.detectors import foundation
from d3etr.detectors.build import build_detector
from d3etr.detectors.exports.inversion import invert
from d3etr.detectors.exports.settings import class_slots
from d3etr.detectors.imports.layouts import Agree
from d3etr.detectors.weights import WeightsInfo, load_weights, read_info, save_weights
from d3etr.errors import UserError

OF_ONNX = ("x.onnx", "--format", "onnx")


def test_half_the_space_same_detector_no_evaluation_of_other_numbers(tmp_path: Path) -> None:
    config = detector_config(
        backbone=BackboneConfig(name="small"), width=64, encoder_layers=1, decoder_layers=1
    )
    detector = build_detector(config, 2)
    info = WeightsInfo(
        detector=config,
        categories=((1, "a"), (2, "b")),
        preprocessing=PreprocessingConfig(),
        evaluation={"mAP": 0.5, "threshold": 0.3},
    )
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    save_weights(source, detector, info)
    assert main(["export", str(source), str(target), "--half"]) == 0
    assert target.stat().st_size < 0.6 * source.stat().st_size
    loaded, found = load_weights(target)
    assert found.evaluation == {"threshold": 0.3} and found.detector == config
    for name, tensor in detector.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], tensor, rtol=1e-3, atol=1e-6), name


def test_a_plain_copy_keeps_the_evaluation(tmp_path: Path) -> None:
    config = detector_config(backbone=BackboneConfig(name="small"), width=32, decoder_layers=1)
    info = WeightsInfo(
        detector=config,
        categories=((1, "a"),),
        preprocessing=PreprocessingConfig(),
        evaluation={"mAP": 0.5},
    )
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    save_weights(source, build_detector(config, 1), info)
    assert main(["export", str(source), str(target)]) == 0
    assert read_info(target).evaluation == {"mAP": 0.5}


OVER_DINOV3 = {
    "points": 2,
    "backbone": {
        "name": "dinov3",
        "dinov3": {"width": 16, "heads": 2, "blocks": 3, "outputs": (1, 2, 3), "normed": "none"},
    },
}


def _saved(folder: Path, preprocessing: PreprocessingConfig | None = None, **settings: Any) -> Path:
    """Untrained weights of a tiny detector of two classes."""
    sizes = {"width": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "queries": 3}
    config = detector_config(**{**sizes, "backbone": {"name": "resnet18"}, **settings})
    info = WeightsInfo(
        detector=config,
        categories=((1, "a"), (2, "b")),
        preprocessing=preprocessing or PreprocessingConfig(),
    )
    save_weights(folder / "source.safetensors", build_detector(config, 2), info)
    return folder / "source.safetensors"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"name": "detr"}, "its classification is 'sigmoid', theirs a softmax"),
        ({"name": "dab_detr", "inverse_sigmoid_epsilon": 1e-3}, "theirs always 1e-05"),
        ({"name": "dab_detr", "grid_temperature": 20.5}, "theirs a whole number"),
        ({"name": "dino"}, "no such detector as 'dino', and nothing there could read the folder"),
        ({"name": "rt_detr", "learned_content": True}, "its queries have a learned content"),
        ({"name": "d_fine", "learned_content": True}, "its queries have a learned content"),
        ({"name": "d_fine", "activation": "silu"}, "its activation is 'silu', theirs always"),
        ({"name": "deimv2"}, "implementation 'transformers'"),
        ({"name": "deimv2", **OVER_DINOV3}, "no map of its backbone is normed"),
        (
            {"name": "deimv2", "levels": 2, **OVER_DINOV3},
            "it reads 2 maps of its backbone, theirs 3",
        ),
        ({"name": "d_fine", **OVER_DINOV3}, "the backbone is 'dinov3', and only"),
        (
            {"name": "d_fine", "preprocessing": PreprocessingConfig(exact_size=(96, 100))},
            "its exact_size is 96 x 100, and theirs takes multiples of 32 only",
        ),
        ({"backbone": {"name": "small"}}, "the backbone is 'small', and only these"),
        ({"backbone": {"name": "timm/convnext_atto"}}, "timm/hgnetv2_b0 to b6"),
        (
            {"backbone": {"name": "timm/hgnetv2_b0", "norm": "group"}},
            "the backbone has GroupNorm",
        ),
        ({"backbone": {"name": "resnext50_32x4d"}}, "the backbone is 'resnext50_32x4d'"),
        ({"backbone": {"name": "resnet18", "norm": "group"}}, "the backbone has GroupNorm"),
        ({"backbone": {"name": "resnet18", "dilation": True}}, "a dilated 'resnet18' is not"),
        (
            {"preprocessing": PreprocessingConfig(normalisation="per_image")},
            "its preprocessing normalises 'per_image'",
        ),
        (
            {"preprocessing": PreprocessingConfig(shortest_side=None)},
            "bounds the longest side (1333) without a shortest one",
        ),
    ],
)
def test_what_transformers_cannot_say_is_refused_by_name(
    settings: dict[str, Any], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = _saved(tmp_path, **settings), tmp_path / "folder"
    assert main(["export", str(source), str(folder), "--format", "hugging-face"]) == 2
    said = capsys.readouterr().err
    assert text in said and "transformers has no such" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.safetensors"]


def test_several_reasons_are_named_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _saved(tmp_path, name="detr", backbone={"name": "small"})
    assert main(["export", str(source), str(tmp_path / "x"), "--format", "hugging-face"]) == 2
    said = capsys.readouterr().err
    assert "theirs a softmax" in said and "the backbone is 'small'" in said


def test_an_existing_folder_is_not_written_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    command = ["export", "nowhere.safetensors", str(tmp_path / "folder")]
    assert main([*command, "--format", "hugging-face"]) == 2
    assert "folder is there already" in capsys.readouterr().err


def test_without_transformers_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foundation, "version", lambda name: "4.57.1")
    command = ["export", "nowhere.safetensors", str(tmp_path / "folder")]
    assert main([*command, "--format", "hugging-face"]) == 2
    said = capsys.readouterr().err
    assert "--format hugging-face needs the package transformers" in said and "4.57.1" in said


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["x.onnx"], "no other format is written (.onnx is what --format onnx writes)"),
        (["x.xml"], "(.xml is what --format openvino writes)"),
        (["x.pt2", "--format", "onnx"], "(.pt2 is what --format torch-export writes)"),
        (["x.safetensors", "--format", "onnx"], "(.safetensors is what --format d3etr writes)"),
        (["x.engine"], "another format: --format onnx or --format torch-export or --format"),
        (["s3://b/x.onnx", "--format", "onnx"], "expected a file on this machine"),
        (["x.onnx", "--format", "onnx", "--half"], "--half goes with --format d3etr, not with"),
        (["x.safetensors", "--opset", "18"], "--opset goes with --format onnx or torch-export"),
        (["x.pt2", "--format", "torch-export", "--opset", "18"], "--opset goes with --format onnx"),
        (["x.onnx", "--format", "onnx", "--opset", "11"], "expected a whole number from 18 to 23"),
        (["x.onnx", "--format", "onnx", "--size", "0", "4"], "expected a whole number of at least"),
        (["x.onnx", "--format", "hugging-face"], "found the file name 'x.onnx'"),
        ([*OF_ONNX, "--quantise", "float16", "--opset", "21"], "goes with --opset up to 20"),
        ([*OF_ONNX, "--quantise", "int8-static"], "int8-static needs --calibration"),
        ([*OF_ONNX, "--quantise", "float16", "--calibration", "x"], "with --quantise int8-static"),
        ([*OF_ONNX, "--annotations", "a.json"], "--annotations goes with --quantise"),
        ([*OF_ONNX, "--quantise", "float16", "--images", "."], "--images goes with --annotations"),
        (["x.pt2", "--format", "torch-export", "--quantise", "float16"], "with --format onnx, not"),
        (["x.safetensors", "--format", "hugging-face"], "is what --format d3etr writes"),
        (["s3://b/x", "--format", "hugging-face"], "expected a folder on this machine"),
        (["x", "--format", "hugging-face", "--half"], "from_pretrained(FOLDER, dtype="),
        (["x", "--format", "tensorrt"], "invalid choice"),
    ],
)
def test_what_is_written_goes_with_the_format(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", "w.safetensors", *arguments])
    assert stop.value.code == 2
    assert text in " ".join(capsys.readouterr().err.split())


def test_classes_have_the_outputs_of_their_ids_where_the_import_finds_them_there() -> None:
    assert class_slots(((1, "a"), (3, "b")), unused=2) == [1, 3]
    assert class_slots(((1, "a"), (4, "b")), unused=2) == [0, 1]  # an id without an output
    assert class_slots(((1, "a"), (0, "b")), unused=0) == [0, 1]  # not by rising id
    assert class_slots(((0, "a"), (1, "b")), unused=0) == [0, 1]


def test_a_detector_that_the_import_would_not_make_is_refused() -> None:
    theirs = {"w": torch.zeros(2, 3), "b": torch.zeros(2), "x.num_batches_tracked": torch.zeros(())}
    ours = {"stacked": torch.arange(6.0).view(3, 2), "bias": torch.tensor([7.0, 8.0])}

    def take(ids: Mapping[str, Tensor], agree: Agree) -> dict[str, Tensor]:
        return {"stacked": ids["w"].T, "bias": ids["b"].flip(0)}

    found = invert(theirs, ours, take)
    assert found["w"].tolist() == [[0, 2, 4], [1, 3, 5]] and found["b"].tolist() == [8, 7]
    assert set(found) == {"w", "b"}
    with pytest.raises(UserError, match=r"nothing here fills their tensors other: .* can't be"):
        invert({**theirs, "other": torch.zeros(1)}, ours, take)
    with pytest.raises(UserError, match=r"not have the same tensors or shapes: extra"):
        invert(theirs, {**ours, "extra": torch.zeros(1)}, take)
    with pytest.raises(UserError, match=r"not have the same tensors or shapes: bias"):
        invert(theirs, {**ours, "bias": torch.zeros(3)}, take)


def test_copies_of_copies_get_the_number_that_was_kept() -> None:
    theirs = {name: torch.zeros(1) for name in ("a", "b", "c", "d")}

    def take(ids: Mapping[str, Tensor], agree: Agree) -> dict[str, Tensor]:
        assert agree(ids["a"], ids["b"]) and agree(ids["c"], ids["d"])
        assert agree(ids["b"], ids["d"])
        return {"one": ids["d"]}

    found = invert(theirs, {"one": torch.tensor([5.0])}, take)
    assert {name: x.item() for name, x in found.items()} == dict.fromkeys("abcd", 5.0)
