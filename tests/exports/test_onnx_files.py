"""ONNX files detect what their detectors do, at sizes and batches that were never traced."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILY
from tiny_exports import CATEGORIES, as_array, eager, noise, sizes_of, untrained

from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.weights import WeightsInfo
from d3etr.errors import UserError
from d3etr.exports.comparison import compare
from d3etr.exports.description import Description
from d3etr.exports.export import export_graph
from d3etr.exports.graph import GraphSettings
from d3etr.exports.onnx_file import OnnxFormat

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

FIXED = {"lw_detr": (96, 64), "rf_detr": (64, 96)}
"""Kinds over vision transformers take images of one size."""
QUICK = ("conditional_detr", "deformable_detr", "rt_detr")


Exported = Callable[..., tuple[DetectionTransformer, WeightsInfo, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Exports a kind, once with the same settings: each takes seconds."""

    @cache
    def export(kind: str, **settings: Any) -> tuple[DetectionTransformer, WeightsInfo, Path]:
        path = tmp_path_factory.mktemp(kind) / "model.onnx"
        size = FIXED.get(kind)
        detector, info = untrained(kind, **({"exact_size": size} if size else {}))
        export_graph(path, detector, info, GraphSettings(**settings), OnnxFormat())
        return detector, info, path

    return export


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILY],
)
def test_detections_are_those_of_pytorch(kind: str, exported: Exported) -> None:
    detector, info, path = exported(kind)
    run, model = OnnxFormat().open(path), onnx.load(path)
    shapes = [FIXED[kind]] if kind in FIXED else [(48, 112), (95, 61), (128, 128)]
    for height, width in shapes:
        for images in (1, 3):
            pixels = noise(images, height, width)
            found = run(pixels.numpy(), as_array(sizes_of(pixels)))
            wanted = eager(detector, info, pixels, found.scores.shape[1])
            difference = compare(wanted, found, sizes_of(pixels))
            assert difference.equal and difference.detections, difference
    own = {name.split(".")[0] for name, _ in detector.named_children()} - {"label_embedding"}
    named = {tensor.name.removeprefix("detector.") for tensor in model.graph.initializer}
    kept = {name.split(".")[0] for name in named if "." in name and "val_" not in name}
    assert kept <= own | {"detector"}, kept - own
    assert not any("label_embedding" in tensor.name for tensor in model.graph.initializer)
    assert _dimensions(model.graph.input[0])[:2] == ["batch", 3]
    assert [value.name for value in model.graph.output] == ["boxes", "scores", "labels"]


def test_what_only_training_has_is_left_out(exported: Exported) -> None:
    detector, _, path = exported("rt_detr")
    stored = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)
    held = sum(p.numel() for p in detector.parameters())
    assert stored < 1.1 * held


def _dimensions(value: Any) -> list[Any]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_metadata_say_what_it_is_and_takes(exported: Exported) -> None:
    _, info, path = exported("conditional_detr", detections=7)
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    found = Description.from_metadata(metadata, "model.onnx")
    assert [*zip(found.category_ids, found.names, strict=True)] == [*CATEGORIES]
    assert (found.detector, found.size, found.detections) == ("conditional_detr", None, 7)
    assert found.opset == 18 == model.opset_import[0].version
    assert found.preprocessing.normalisation == info.preprocessing.normalisation
    assert found.inside and found.sampling == "none"
    assert {"d3etr", "torch", "onnx", "onnxscript", "onnxruntime"} == {*found.exporter}
    assert _dimensions(model.graph.input[0]) == ["batch", 3, "height", "width"]
    assert _dimensions(model.graph.output[0]) == ["batch", 7, 4]


def test_gathers_in_place_of_grid_samples(exported: Exported) -> None:
    found = {}
    for settings in ({}, {"sampling": "gather"}):
        _, _, path = exported("deformable_detr", **settings)
        model = onnx.load(path)
        about = Description.from_metadata({e.key: e.value for e in model.metadata_props}, "x")
        found[about.sampling] = {node.op_type for node in model.graph.node}
    assert "GridSample" in found["grid-sample"] and "GridSample" not in found["gather"]


def test_a_size_that_the_graph_would_be_wrong_at_is_refused(tmp_path: Path) -> None:
    detector, info = untrained("lw_detr")
    with pytest.raises(UserError, match=r"cannot be exported for images of any size.*--size"):
        export_graph(tmp_path / "x.onnx", detector, info, GraphSettings(), OnnxFormat())
    assert [*tmp_path.iterdir()] == []


def test_what_detects_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, info = untrained("conditional_detr")
    opened = OnnxFormat.open

    def wrong(self: OnnxFormat, path: Path) -> Any:
        run = opened(self, path)

        def shifted(images: Any, sizes: Any) -> Any:
            found = run(images, sizes)
            return found._replace(boxes=found.boxes + 0.0005 * float(sizes.max()))

        return shifted

    monkeypatch.setattr(OnnxFormat, "open", wrong)
    path = tmp_path / "model.onnx"
    path.write_text("what was there")
    with pytest.raises(UserError, match=r"the onnx file is not kept, because it detects something"):
        export_graph(path, detector, info, GraphSettings(), OnnxFormat())
    assert path.read_text() == "what was there" and len([*tmp_path.iterdir()]) == 1


def test_the_detector_stays_as_it_was(exported: Exported) -> None:
    before = eager(*untrained("deformable_detr"), noise(1, 64, 80), 15)
    detector, info, _ = exported("deformable_detr", sampling="gather")
    after = eager(detector, info, noise(1, 64, 80), 15)
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(parameter.requires_grad for parameter in detector.encoder.parameters())
    assert torch.is_grad_enabled()
