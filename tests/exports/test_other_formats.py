"""``torch.export`` and OpenVINO files detect what their detectors do."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tiny_exports import as_array, eager, noise, sizes_of, untrained

from d3etr.errors import UserError
from d3etr.exports.comparison import compare
from d3etr.exports.description import Description
from d3etr.exports.export import _describe, export_graph
from d3etr.exports.formats import GraphFormat
from d3etr.exports.graph import GraphSettings, Traced
from d3etr.exports.openvino_file import OpenVinoFormat
from d3etr.exports.openvino_runtime import OpenVinoProcess
from d3etr.exports.torch_export import METADATA, TorchExportFormat

SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", ["conditional_detr", pytest.param("rt_detr", marks=SLOW)])
@pytest.mark.parametrize("name", ["torch-export", "openvino"])
def test_detections_are_those_of_pytorch(name: str, kind: str, tmp_path: Path) -> None:
    written: GraphFormat = TorchExportFormat()
    path = tmp_path / "model.pt2"
    if name == "openvino":
        pytest.importorskip("openvino")
        pytest.importorskip("onnxscript")
        written, path = OpenVinoFormat(), tmp_path / "model.xml"
    detector, info = untrained(kind)
    try:
        export_graph(path, detector, info, GraphSettings(), written)
    except UserError as error:
        if "OpenVINO's own code ended with signal" not in str(error):
            raise
        pytest.skip(f"refused, as it has to be: {error}")
    run = written.open(path)
    for height, width, images in ((48, 112, 1), (95, 61, 3)):
        pixels = noise(images, height, width)
        found = run(pixels.numpy(), as_array(sizes_of(pixels)))
        wanted = eager(detector, info, pixels, found.scores.shape[1])
        difference = compare(wanted, found, sizes_of(pixels))
        assert difference.equal and difference.detections, difference
    files = {file.name for file in tmp_path.iterdir()}
    assert files == ({"model.pt2"} if name == "torch-export" else {"model.xml", "model.bin"})


def test_a_crash_of_openvino_is_an_error(tmp_path: Path) -> None:
    """Its kernels end the process on some processors; d3etr's own goes on."""
    model = OpenVinoProcess(tmp_path / "model.xml")
    os.kill(model.pid, signal.SIGSEGV)
    with pytest.raises(UserError, match=r"ended with signal SIGSEGV .* take --format onnx"):
        model(noise(1, 32, 32).numpy(), as_array([(32, 32)]))


def test_a_file_of_torch_export_says_what_it_is(tmp_path: Path) -> None:
    detector, info = untrained("conditional_detr", normalisation="unit", exact_size=(48, 64))
    path = tmp_path / "model.pt2"
    export_graph(path, detector, info, GraphSettings(inside=False), TorchExportFormat())
    extra = {METADATA: ""}
    program = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra)
    found = Description.from_metadata(json.loads(extra[METADATA]), str(path))
    assert found.size == (48, 64) == found.preprocessing.exact_size
    assert not found.inside and found.opset is None and found.names == ("tree", "cat", "dog")
    boxes, scores, labels = program.module()(torch.rand(4, 3, 48, 64), torch.full((4, 2), 100))
    assert boxes.shape == (4, 15, 4) and scores.shape == labels.shape == (4, 15)


@pytest.mark.parametrize(
    ("size", "given", "answers", "kept"),
    [
        (None, None, 15, True),
        ((48, 64), None, 15, True),
        ((48, 64), (48, 64), 15, True),
        ((48, 64), (32, 64), 15, False),
        (None, (48, 64), 15, False),
        (None, None, 14, False),
    ],
)
def test_the_recorded_quality_is_of_that_size_and_as_many_detections(
    size: tuple[int, int] | None, given: tuple[int, int] | None, answers: int, kept: bool
) -> None:
    _, info = untrained("conditional_detr", **({"exact_size": size} if size else {}))
    recorded = {"split": "test", "data_digest": "x", "mAP": 0.5}
    info = info.model_copy(update={"evaluation": recorded | {"AR": 0.6}})
    traced = Traced(Mock(), Mock(), given or size, 32, answers, "none")
    about = _describe(info, GraphSettings(size=given), TorchExportFormat(), traced)
    assert about.evaluation == (recorded if kept else {})
