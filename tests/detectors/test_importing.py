"""Weights of others: what is recognised, what is refused and why, and what is written."""

from __future__ import annotations

import json
import os
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from official_checkpoints import HEADS, official_state
from safetensors.torch import save_file
from torch import Tensor

from d3etr.cli.main import main
from d3etr.config.backbone import BackboneConfig
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.heads import sigmoid_logits
from d3etr.detectors.imports import importing
from d3etr.detectors.imports.categories import COCO, COCO_SLOTS, slots_of
from d3etr.detectors.imports.importing import import_weights, recognise
from d3etr.detectors.imports.layouts import LAYOUTS, rename
from d3etr.detectors.imports.preprocessing import preprocessing_of
from d3etr.detectors.imports.settings import Unseen, from_config
from d3etr.detectors.torchvision_backbone import build_network
from d3etr.detectors.weights import load_backbone_weights, load_weights, read_info
from d3etr.errors import UserError

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def conditional() -> State:
    """An official Conditional DETR of COCO's 91 slots."""
    return official_state("conditional_detr", COCO_SLOTS)


@pytest.fixture
def checkpoint(tmp_path: Path, conditional: State) -> Path:
    """Its checkpoint, with the arguments of its training."""
    return write(tmp_path / "official.pth", conditional)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where to write."""
    return tmp_path / "imported" / "ours.safetensors"


def write(path: Path, state: State, **args: Any) -> Path:
    args = {"nheads": HEADS, "dilation": False} | args
    torch.save({"model": state, "args": Namespace(**args), "epoch": 50}, path)
    return path


def refusal(source: Path, target: Path, said: Unseen | None = None, **options: Any) -> str:
    """Why an import is refused; nothing may have been written."""
    with pytest.raises(UserError) as caught:
        import_weights(source, target, said, **options)
    assert not target.parent.exists()
    assert str(source) in str(caught.value)
    return str(caught.value)


def test_cocos_91_slots_become_its_80_categories(
    checkpoint: Path, target: Path, conditional: State
) -> None:
    imported = import_weights(checkpoint, target)
    detector, info = load_weights(target)
    assert info.categories == COCO
    assert len(info.categories) == 80
    assert info.detector.heads == HEADS
    assert (info.preprocessing.shortest_side, info.preprocessing.longest_side) == (800, 1333)
    rows = [number for number, _ in COCO]
    weight = detector.state_dict()["class_head.weight"]
    assert torch.equal(weight, conditional["class_embed.weight"][rows])
    assert "11 outputs that belong to no category were left out" in imported.notes
    assert info.origin["imported"]["kind"] == "an official checkpoint of conditional_detr"


def test_unused_slots_stay_in_detrs_softmax(tmp_path: Path, target: Path) -> None:
    state = official_state("detr", COCO_SLOTS)
    import_weights(write(tmp_path / "detr.pth", state), target)
    detector, info = load_weights(target)
    assert (info.detector.classification, info.detector.unused_outputs) == ("softmax", 11)
    states = torch.randn(9, 32)
    theirs = states @ state["class_embed.weight"].T + state["class_embed.bias"]
    head = detector.state_dict()
    ours = sigmoid_logits(states @ head["class_head.weight"].T + head["class_head.bias"], 80)
    rows = [number for number, _ in COCO]
    torch.testing.assert_close(ours.sigmoid(), theirs.softmax(-1)[:, rows])


def test_the_first_stage_keeps_the_slot_that_stands_for_some_object(
    tmp_path: Path, target: Path
) -> None:
    state = official_state("deformable-two-stage", COCO_SLOTS)
    import_weights(write(tmp_path / "two.pth", state, num_queries=17), target)
    detector, info = load_weights(target)
    assert info.detector.queries == 17
    ours = detector.state_dict()
    assert torch.equal(ours["proposals.class_head.bias"][:2], state["class_embed.3.bias"][[0, 2]])
    assert torch.equal(ours["decoder.class_heads.2.bias"][:2], state["class_embed.2.bias"][[1, 2]])


@pytest.mark.parametrize(
    ("categories", "rows"),
    [(((2, "cat"), (5, "dog")), [2, 5]), (tuple((i + 1, str(i)) for i in range(7)), [*range(7)])],
    ids=["ids-are-outputs", "as-many-as-outputs"],
)
def test_categories_of_other_sets_are_given(
    categories: tuple[tuple[int, str], ...], rows: list[int], tmp_path: Path, target: Path
) -> None:
    state = official_state("conditional_detr", 7)
    source = write(tmp_path / "own.pth", state)
    assert "--categories ANNOTATIONS.json" in refusal(source, target)
    too_many = tuple((index, str(index)) for index in range(9))
    assert "has 7 outputs" in refusal(source, target, categories=too_many)
    import_weights(source, target, categories=categories)
    detector, info = load_weights(target)
    assert info.categories == categories
    bias = detector.state_dict()["class_head.bias"]
    assert torch.equal(bias, state["class_embed.bias"][rows])


def test_every_misfit_is_named(tmp_path: Path, target: Path, conditional: State) -> None:
    state = dict(conditional)
    del state["transformer.decoder.norm.weight"]
    state["transformer.patterns.weight"] = torch.zeros(3, 32)
    state["bbox_embed.layers.0.weight"] = torch.zeros(32, 31)
    text = refusal(write(tmp_path / "broken.pth", state), target)
    for part in (
        "missing: decoder.norm.weight",
        "left over: patterns.weight",
        "box_head.layers.0.weight ([32, 31], expected [32, 32])",
    ):
        assert part in text


def test_copies_that_differ_are_refused(tmp_path: Path, target: Path) -> None:
    state = official_state("dab_detr", COCO_SLOTS)
    state["transformer.decoder.bbox_embed.layers.1.bias"] = torch.zeros(32)
    assert "their values differ" in refusal(write(tmp_path / "dab.pth", state), target)
    state = official_state("deformable_detr", COCO_SLOTS)
    state["class_embed.2.bias"] = torch.zeros(COCO_SLOTS)
    assert "their values differ" in refusal(write(tmp_path / "deformable.pth", state), target)


class Trap:
    """Writes a file when a careless reader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_checkpoint_is_executed(
    zipped: bool, tmp_path: Path, target: Path, conditional: State
) -> None:
    trap = tmp_path / "sprung"
    source = tmp_path / "hostile.pth"
    torch.save(
        {"model": conditional, "args": Namespace(trap=Trap(trap))},
        source,
        _use_new_zipfile_serialization=zipped,
    )
    text = refusal(source, target)
    assert f"more than weights: {os.mkdir.__module__}.mkdir" in text
    assert "torch.save(model.state_dict(), FILE)" in text
    assert not trap.exists()
    with pytest.raises(FileNotFoundError):  # the trap would work
        pickle.loads(pickle.dumps(Trap(trap / "below" / "nothing")))


def test_checkpoints_before_torch_1_6_and_of_ddp_are_read(
    tmp_path: Path, target: Path, conditional: State
) -> None:
    source = tmp_path / "old.pth"
    state = {f"module.{name}": tensor for name, tensor in conditional.items()}
    torch.save({"model": state}, source, _use_new_zipfile_serialization=False)
    imported = import_weights(source, target)
    assert imported.architecture["heads"] == 8
    assert any("assumed 8 (--heads)" in note for note in imported.notes)
    assert any("--dilation" in note for note in imported.notes)


def test_what_is_no_checkpoint_is_named(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "x.pth"
    assert "cannot be read" in refusal(source, target)
    source.write_bytes(b"\x00 nothing of the kind")
    assert "no whole checkpoint of torch.save" in refusal(source, target)
    torch.save({"model": {}, "epoch": 3}, source)
    assert "no tensors by name in this checkpoint (with the keys 'model', 'epoch')" in refusal(
        source, target
    )
    torch.save([1, 2], source)
    assert "no tensors by name" in refusal(source, target)
    torch.save({"weight": torch.zeros(2)}, source)
    assert "1 tensors (weight, ...) of no known detector" in refusal(source, target)
    torch.save({"mask_head.lay1.weight": torch.zeros(2)}, source)
    assert "panoptic" in refusal(source, target)


def test_cut_off_checkpoints_are_named(checkpoint: Path, target: Path) -> None:
    whole = checkpoint.read_bytes()
    for kept in (0, 100, len(whole) // 2):
        checkpoint.write_bytes(whole[:kept])
        assert "no whole checkpoint" in refusal(checkpoint, target)


def test_what_weights_do_not_show_must_not_be_guessed(
    tmp_path: Path, target: Path, conditional: State
) -> None:
    source = tmp_path / "r50dc5.pth"
    torch.save({"model": conditional}, source)
    assert "say --dilation or --no-dilation" in refusal(source, target)
    imported = import_weights(source, target, Unseen(heads=4, dilation=True))
    assert imported.architecture["backbone"]["dilation"]
    assert imported.notes == ("11 outputs that belong to no category were left out",)


def test_a_dilated_dab_detrs_temperature_must_be_said(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "dab.pth"
    torch.save({"model": official_state("dab_detr", COCO_SLOTS)}, source)
    said = Unseen(heads=4, dilation=True)
    assert "say --temperature 20 or 10" in refusal(source, target, said)
    imported = import_weights(source, target, Unseen(heads=4, dilation=True, temperature=10))
    found = read_info(target).detector
    assert (found.grid_temperature, found.inverse_sigmoid_epsilon) == (10, 1e-3)
    assert any("inverse_sigmoid_epsilon is 0.001" in note for note in imported.notes)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (Unseen(heads=8), "its args say heads 4, but --heads says 8"),
        (Unseen(dilation=True), "its args say dilation False, but --dilation says True"),
        (Unseen(temperature=10), "--temperature would have no effect"),
    ],
)
def test_contradictions_are_refused(
    checkpoint: Path, target: Path, said: Unseen, text: str
) -> None:
    assert text in refusal(checkpoint, target, said)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"pre_norm": True}, "pre_norm is True, expected False"),
        ({"position_embedding": "learned"}, "position_embedding is 'learned'"),
        ({"masks": True, "num_patterns": 3}, "masks is True, expected False; num_patterns is 3"),
        ({"nheads": "many"}, "heads: Input should be a valid integer"),
        ({"nheads": 3}, "must be a multiple of 2 * heads"),
    ],
)
def test_variants_of_other_arithmetic_are_refused(
    args: dict[str, Any], text: str, tmp_path: Path, target: Path, conditional: State
) -> None:
    assert text in refusal(write(tmp_path / "variant.pth", conditional, **args), target)


@pytest.mark.parametrize("wrapped", [True, False])
def test_torchvisions_resnets_become_backbone_files(
    wrapped: bool, tmp_path: Path, target: Path
) -> None:
    source = tmp_path / "resnet34.pth"
    state = torchvision.models.resnet34(weights=None).state_dict()
    torch.save({"model": state} if wrapped else state, source)
    said = Unseen(dilation=True)
    assert "--dilation and --categories would have no effect" in refusal(
        source, target, said, categories=((1, "one"),)
    )
    assert import_weights(source, target).network == "resnet34"
    backbone = build_backbone(BackboneConfig(name="resnet34"))
    load_backbone_weights(backbone, target)
    weight = backbone.state_dict()["layer3.5.conv2.weight"]
    assert torch.equal(weight, state["layer3.5.conv2.weight"])


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t", "regnet_x_400mf"])
def test_torchvisions_networks_are_recognised(name: str, tmp_path: Path, target: Path) -> None:
    """Also with another classifier."""
    state = torchvision.models.get_model(name, weights=None, num_classes=7).state_dict()
    source = tmp_path / "network.pth"
    torch.save(state, source)
    imported = import_weights(source, target)
    assert (imported.network, imported.architecture["name"]) == (name, name)
    backbone = build_backbone(BackboneConfig(name=name))
    load_backbone_weights(backbone, target)
    assert imported.tensors == len(backbone.state_dict())
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state[key])


def test_networks_of_other_shapes_are_not_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ("resnet34", "resnet50", "resnext50_32x4d", "convnext_tiny")
    monkeypatch.setattr(importing, "TORCHVISION", known)
    state = build_network("resnext50_32x4d").state_dict()
    assert recognise(state) == "resnext50_32x4d"
    assert recognise({"x": torch.zeros(1), **state}) is None
    assert recognise({**state, "layer3.0.conv9.weight": torch.zeros(1)}) is None
    del state["layer3.0.conv2.weight"]
    assert recognise(state) is None


def test_unknown_networks_are_refused(tmp_path: Path, target: Path) -> None:
    torch.save({"trunk.weight": torch.zeros(1)}, tmp_path / "network.pth")
    assert "one of torchvision's networks that are backbones" in refusal(
        tmp_path / "network.pth", target
    )


def test_our_own_files_are_checked_and_copied(tiny_weights: Path, target: Path) -> None:
    assert "--heads would have no effect" in refusal(tiny_weights, target, Unseen(heads=2))
    import_weights(tiny_weights, target)
    assert read_info(target) == read_info(tiny_weights)


def test_a_failed_import_leaves_the_old_file(checkpoint: Path, target: Path) -> None:
    import_weights(checkpoint, target)
    before = target.read_bytes()
    checkpoint.write_bytes(b"")
    with pytest.raises(UserError):
        import_weights(checkpoint, target)
    assert target.read_bytes() == before
    assert [file.name for file in target.parent.iterdir()] == [target.name]


CONFIG: dict[str, Any] = {
    "model_type": "detr",
    "architectures": ["DetrForObjectDetection"],
    "activation_function": "relu",
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "use_timm_backbone": True,
    "backbone": "resnet50",
}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"model_type": "yolos"},
            "model_type is yolos; expected one of conditional_detr, d_fine, dab-detr",
        ),
        ({"architectures": ["DetrForSegmentation"]}, "expected a ...ForObjectDetection"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu', expected 'relu'"),
        ({"decoder_attention_heads": 4}, "decoder_attention_heads is 4"),
        ({"backbone_config": {"model_type": "swin"}}, "model_type is 'swin', expected 'resnet'"),
    ],
)
def test_models_of_other_kinds_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as caught:
        from_config(CONFIG | changes, "config.json")
    assert text in str(caught.value)


def test_dilation_is_read_where_hugging_face_has_it() -> None:
    def dilation(**changes: Any) -> bool | None:
        return from_config(CONFIG | changes, "config.json")[1].dilation

    assert not dilation()
    assert dilation(dilation=True)
    assert dilation(backbone_config={"model_type": "timm_backbone", "output_stride": 16})
    assert dilation(backbone_kwargs={"output_stride": 16})
    assert not dilation(dilation=True, backbone_config={"model_type": "resnet"})


def test_timms_backbones_have_torchvisions_names() -> None:
    names = (
        "conv1.weight",
        "bn1.running_var",
        "layer2.1.conv2.weight",
        "layer3.0.downsample.1.bias",
    )
    for prefix in ("backbone.conv_encoder.model.", "backbone.model._backbone.", "backbone.model."):
        theirs = {f"model.{prefix}{name}": torch.zeros(1) for name in names}
        found = rename(theirs, "dab_detr")
        assert set(found) == {f"backbone.{name}" for name in names}


def test_preprocessing_is_the_folders() -> None:
    assert preprocessing_of({}, "x").longest_side == 1333
    old = preprocessing_of({"size": 480, "max_size": 800}, "x")
    assert (old.shortest_side, old.longest_side) == (480, 800)
    assert preprocessing_of({"do_resize": False}, "x").shortest_side is None
    with pytest.raises(UserError, match="image_mean is"):
        preprocessing_of({"image_mean": [0.5, 0.5, 0.5]}, "x")
    with pytest.raises(UserError, match="expected shortest_edge and longest_edge, or height"):
        preprocessing_of({"size": {"max_height": 640, "max_width": 640}}, "x")
    with pytest.raises(UserError, match="rescale_factor is 1"):
        preprocessing_of({"rescale_factor": 1.0}, "x")


def test_preprocessing_of_rt_detr_stretches_and_divides_alone() -> None:
    size = {"height": 640, "width": 512}
    plain = {"do_normalize": False, "image_mean": [0.5] * 3, "do_pad": False}
    found = preprocessing_of({"size": size, **plain}, "x")
    assert (found.exact_size, found.normalisation) == ((640, 512), "unit")
    assert found.shortest_side is found.longest_side is None
    assert preprocessing_of({"size": size}, "x").normalisation == "imagenet"
    assert preprocessing_of({"size": size, "do_pad": True, "pad_size": size}, "x") is not None
    with pytest.raises(UserError, match="pad_size is"):
        preprocessing_of({"do_pad": True, "pad_size": size}, "x")


def test_incomplete_folders_are_named(tmp_path: Path, target: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert "config.json cannot be read" in refusal(folder, target)
    (folder / "config.json").write_text("{")
    assert "broken JSON" in refusal(folder, target)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "pytorch_model.bin").touch()
    assert "pytorch_model.bin there are of a format that can execute code" in refusal(
        folder, target
    )
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))
    assert "'../outside.safetensors' is no file of this folder" in refusal(folder, target)
    index.write_text(json.dumps({"weight_map": {"x": "part.safetensors"}}))
    assert "part.safetensors does not exist" in refusal(folder, target)
    save_file({"x": torch.zeros(1)}, folder / "part.safetensors")
    assert "expected a ResNet (resnet18" in refusal(folder, target)
    with pytest.raises(UserError, match="give the folder"):
        import_weights(folder / "part.safetensors", target)


def test_the_command_reports_in_words_and_as_json(
    checkpoint: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import-weights", str(checkpoint), str(target)]) == 0
    text = capsys.readouterr().out
    for part in (
        "an official checkpoint of conditional_detr",
        "resnet18; 2 encoder layers, 3 decoder layers, 11 queries, 32 width, 4 heads",
        "80: person, bicycle, car",
        "11 outputs that belong to no category were left out",
        f"{target}: written",
    ):
        assert part in text
    assert main(["import-weights", str(checkpoint), str(target), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["network"] == "conditional_detr"
    assert len(report["categories"]) == 80
    assert main(["import-weights", str(checkpoint), str(target), "--no-dilation"]) == 0
    assert main(["import-weights", str(checkpoint), str(target), "--heads", "8"]) == 2
    assert "error: " in capsys.readouterr().err


def test_the_command_reads_categories_from_an_annotation_file(tmp_path: Path, target: Path) -> None:
    source = write(tmp_path / "own.pth", official_state("conditional_detr", 7))
    annotations = tmp_path / "train.json"
    names = [{"id": 3, "name": "tree"}, {"id": 6, "name": "cat"}]
    images = [{"id": 1, "file_name": "1.jpg", "width": 9, "height": 9}]
    content = {"images": images, "annotations": [], "categories": names}
    annotations.write_text(json.dumps(content))
    given = ["--categories", str(annotations)]
    assert main(["import-weights", str(source), str(target), *given]) == 0
    assert read_info(target).categories == ((3, "tree"), (6, "cat"))


def test_eighty_outputs_are_cocos_categories_where_the_kind_has_one_for_each() -> None:
    """RT-DETR and D-FINE number COCO's categories through; others have an output for each id."""
    layout = LAYOUTS["rt_detr"]
    categories, used = slots_of(80, None, None, layout.coco)
    assert categories == COCO and categories[-1] == (90, "toothbrush")
    assert used == list(range(80))
    with pytest.raises(UserError, match="has 80 outputs, not the 91"):
        slots_of(80, None, None, LAYOUTS["detr"].coco)
