"""Quantised ONNX files: what is in smaller numbers, what is not, and what it costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_exports import CATEGORIES, untrained

from d3etr.cli.main import main
from d3etr.config.data import SplitConfig
from d3etr.data.splits import UNLABELLED, DetectionSplit, read_split
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.weights import WeightsInfo, save_weights
from d3etr.errors import UserError
from d3etr.exports import quantised_export
from d3etr.exports.agreement import Agreement, agreement
from d3etr.exports.calibration import IMAGES, chosen
from d3etr.exports.description import Description
from d3etr.exports.export import Export, export_graph
from d3etr.exports.graph import GraphSettings
from d3etr.exports.onnx_file import WEIGHT, OnnxFormat
from d3etr.exports.onnx_predictor import load_onnx
from d3etr.exports.quantisation import quantise
from d3etr.exports.quantised_export import QuantisedSettings, export_quantised

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SIZES = ((64, 84), (84, 64), (96, 96))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, and their annotations in ``a.json``."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "pictures").mkdir()
    rng, images, annotations = np.random.default_rng(0), [], []
    for number, (height, width) in enumerate(SIZES, start=1):
        name = f"{number}.png"
        pixels = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / "pictures" / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        box = {"id": number, "image_id": number, "category_id": CATEGORIES[number - 1][0]}
        annotations.append(box | {"bbox": [9, 9, 40, 40], "area": 1600, "iscrowd": 0})
    names = [{"id": number, "name": name} for number, name in CATEGORIES]
    content = {"images": images, "annotations": annotations, "categories": names}
    (folder / "a.json").write_text(json.dumps(content))
    return folder


def _described(model: Any) -> Description:
    return Description.from_metadata({x.key: x.value for x in model.metadata_props}, "model.onnx")


def _weights_of(model: Any, name: str) -> set[int]:
    """Types of the constants that nodes multiply by whose weight is called so."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    nodes = [n for n in model.graph.node if any(name in x.value for x in n.metadata_props)]
    assert nodes, name
    return {types[value] for node in nodes for value in node.input if value in types}


def test_static_integers_cost_what_evaluate_measures(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector, info = untrained("conditional_detr")
    info = info.model_copy(update={"evaluation": {"mAP": 0.9, "data_digest": "x"}})
    weights, target, pictures = tmp_path / "w.safetensors", tmp_path / "q.onnx", scenes / "pictures"
    save_weights(weights, detector, info)
    places = ["--annotations", str(scenes / "a.json"), "--images", str(pictures)]
    how = ["--format", "onnx", "--quantise", "int8-static", "--calibration", str(pictures)]
    assert main(["export", str(weights), str(target), *how, *places, "--json"]) == 0
    answered = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(target), *places, "--device", "cpu", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    model = onnx.load(target)
    about = _described(model)
    assert about.quantisation == {k: answered[k] for k in about.quantisation or {}}
    assert answered["mAP"] == evaluated["metrics"]["mAP"] == about.evaluation["mAP"]
    assert about.evaluation["data_digest"] == evaluated["data_digest"]
    assert answered["kind"] == "int8-static" and answered["calibration_images"] == len(SIZES)
    assert answered["images"] == len(SIZES) and answered["float32_mAP"] >= 0
    assert answered["bytes"] == target.stat().st_size and answered["float32_bytes"] > 0
    quantised = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    assert convolutions and all({*n.input[:2]} <= quantised for n in convolutions)
    assert _weights_of(model, "box_head") == {onnx.TensorProto.FLOAT}
    assert {path.name for path in tmp_path.iterdir()} == {"w.safetensors", "q.onnx"}


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Export]:
    """A float32 file, exported once."""
    path = tmp_path_factory.mktemp("float32") / "x.onnx"
    return path, export_graph(path, *_confident(), GraphSettings(), OnnxFormat())


@pytest.fixture
def quick(float32: tuple[Path, Export], monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised exports begin with a copy of that file."""
    source, done = float32

    def copied(path: Path, *arguments: Any) -> Export:
        shutil.copyfile(source, path)
        return done

    monkeypatch.setattr(quantised_export, "export_graph", copied)


def _confident() -> tuple[DetectionTransformer, WeightsInfo]:
    """A detector all of whose detections are shown, and a mAP that is not the quantised file's."""
    detector, info = untrained("conditional_detr")
    return detector, info.model_copy(update={"evaluation": {"mAP": 0.9, "threshold": 0.0}})


@pytest.mark.usefixtures("quick")
def test_without_annotations_unmatched_detections_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    settings = QuantisedSettings("int8-dynamic")
    done = export_quantised(path, *_confident(), GraphSettings(), OnnxFormat(), settings)
    model = onnx.load(path)
    about = _described(model)
    assert about == done.description and about.evaluation == {}
    found = dict(about.quantisation or {})
    assert found["kind"] == "int8-dynamic" and found["compared_images"] > 3
    assert found["compared_detections"] > 0 and 0 <= found["unmatched"] < 1
    products = [n for n in model.graph.node if n.op_type == "MatMulInteger"]
    assert products and not any(n.op_type == "ConvInteger" for n in model.graph.node)


def test_half_numbers_keep_places_and_outputs_in_float32(tmp_path: Path, scenes: Path) -> None:
    detector, info = untrained("rt_detr")
    path = tmp_path / "h.onnx"
    settings = QuantisedSettings("float16")
    pictures = sorted((scenes / "pictures").iterdir())
    export_quantised(path, detector, info, GraphSettings(), OnnxFormat(), settings, pictures)
    model = onnx.load(path)
    kinds = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert [x.type.tensor_type.elem_type for x in model.graph.output] == [
        *[onnx.TensorProto.FLOAT] * 2,
        onnx.TensorProto.INT64,
    ]
    made = {value: node for node in model.graph.node for value in node.output}
    samples = [node for node in model.graph.node if node.op_type == "GridSample"]
    assert samples
    for value in (value for node in samples for value in node.input):
        cast = made[value]
        types = [x.i for x in cast.attribute if x.name == "to"]
        assert cast.op_type != "Cast" or types == [onnx.TensorProto.FLOAT]
    found = load_onnx(path, "cpu").predict(pictures, 0.0)
    assert all(np.isfinite(each.boxes_xyxy).all() for each in found)


def test_nodes_name_their_weight_and_no_place_of_the_machine(
    float32: tuple[Path, Export],
) -> None:
    path, _ = float32
    assert b"stack_trace" not in path.read_bytes() and b".py" not in path.read_bytes()
    model = onnx.load(path)
    named = {x.value for n in model.graph.node for x in n.metadata_props if x.key == WEIGHT}
    assert {"detector_box_head_layers_2_weight", "detector_class_head_weight"} <= named


@pytest.mark.usefixtures("quick")
def test_a_calibration_image_that_is_too_small_leaves_what_was_there(
    scenes: Path, tmp_path: Path
) -> None:
    split = _folder(scenes / "pictures")
    small = tmp_path / "small"
    small.mkdir()
    Image.new("RGB", (9, 9)).save(small / "tiny.png")
    path = tmp_path / "q.onnx"
    path.write_text("what was there")
    settings = QuantisedSettings("int8-static", _folder(small))
    with pytest.raises(UserError, match=r"tiny\.png: the image is shown to the detector as 9 x 9"):
        export_quantised(path, *_confident(), GraphSettings(), OnnxFormat(), settings)
    assert path.read_text() == "what was there"
    assert {each.name for each in tmp_path.iterdir()} == {"small", "q.onnx"}
    assert chosen(split) == chosen(split) and len(chosen(split)) == len(SIZES) <= IMAGES


def test_products_with_a_vector_have_no_columns_and_stay(tmp_path: Path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    constants = {"matrix": np.ones((4, 4), np.float32), "vector": np.ones(4, np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "matrix"], ["y"], "first"),
        helper.make_node("MatMul", ["y", "vector"], ["z"], "second"),
    ]
    ends = [helper.make_tensor_value_info(*x) for x in (("x", kind, [2, 4]), ("z", kind, [2]))]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save(model, tmp_path / "x.onnx")
    quantise(tmp_path / "x.onnx", "int8-dynamic", tmp_path / "q.onnx")
    done = [node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node]
    assert done.count("MatMulInteger") == 1 and done.count("MatMul") == 1


def _folder(place: Path) -> DetectionSplit:
    return read_split(UNLABELLED, SplitConfig(images=place, annotations=place))


def test_detections_are_paired_by_class_and_place() -> None:
    boxes = np.array([[0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 10]], dtype=np.float32)
    labels = np.array([0, 1, 2])
    assert agreement((boxes, labels), (boxes[::-1], labels[::-1])) == Agreement(1, 6, 0)
    moved = boxes + np.array([[2, 0, 2, 0], [9, 0, 9, 0], [0, 0, 0, 0]], dtype=np.float32)
    assert agreement((boxes, labels), (moved, labels)) == Agreement(1, 6, 2)
    other = np.array([0, 1, 1])
    assert agreement((boxes, labels), (boxes, other)).share == pytest.approx(2 / 6)
    none = (boxes[:0], labels[:0])
    assert agreement(none, none).share is None and agreement(none, (boxes, labels)).share == 1
