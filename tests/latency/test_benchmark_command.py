"""Latencies taken in turns, and what ``d3etr benchmark`` says of them."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from d3etr.cli.main import main
from d3etr.config.backbone import BackboneConfig
from d3etr.config.data import PreprocessingConfig
from d3etr.config.detector import detector_config
from d3etr.detectors.build import build_detector
from d3etr.detectors.weights import WeightsInfo, save_weights
from d3etr.errors import UserError
from d3etr.exports.description import ImageSettings
from d3etr.exports.graph import DetectionGraph
from d3etr.exports.onnx_file import OnnxFormat
from d3etr.exports.onnx_predictor import load_onnx
from d3etr.exports.quantisation import quantise
from d3etr.latency.contenders import TorchContender, Way, made_picture, named
from d3etr.latency.exported import ExportContender
from d3etr.latency.measure import WARM_UPS, Timing, measure


def test_everyone_runs_in_every_round_after_others_each_time() -> None:
    def ran() -> tuple[list[str], dict[str, Timing]]:
        order: list[str] = []
        contenders = {name: (lambda name=name: order.append(name), 1) for name in "abcd"}
        timings = measure(contenders, torch.device("cpu"), 30)
        return order[4 * WARM_UPS :], timings

    order, timings = ran()
    assert all(sorted(order[begin : begin + 4]) == [*"abcd"] for begin in range(0, 120, 4))
    before = {name: {x for x, y in pairwise(order) if y == name} for name in "abcd"}
    assert all(before[name] >= {*"abcd"} - {name} for name in "abcd"), "each after every other"
    assert {len(timing.milliseconds) for timing in timings.values()} == {30}
    assert ran()[0] == order, "the same one each time"


def test_percentiles_and_rates() -> None:
    timing = Timing(tuple(float(n) for n in range(1, 21)), 4, None)
    assert timing.median == 10.5 and timing.p95 == 19.0
    assert timing.images_per_second == pytest.approx(4000 / 10.5)
    assert Timing((7.0,), 1, None).p95 == 7.0


def test_names_are_as_short_as_tells_files_apart() -> None:
    files = [
        Path("runs/plain-1/weights.safetensors"),
        Path("runs/plain-2/weights.safetensors"),
        Path("a/teacher.safetensors"),
        Path("b/teacher.safetensors"),
    ]
    assert [*named(files)] == ["plain-1", "plain-2", "teacher", "b/teacher"]
    exported = [Path("a/teacher.safetensors"), Path("a/teacher.onnx")]
    assert [*named(exported)] == ["teacher", "teacher.onnx"]
    with pytest.raises(UserError, match="named twice"):
        named([files[0], files[0]])


def _weights(folder: Path, width: int, **evaluation: object) -> Path:
    config = detector_config(
        backbone=BackboneConfig(name="small"), width=width, encoder_layers=1, decoder_layers=1
    )
    info = WeightsInfo(
        detector=config,
        categories=((1, "a"), (2, "b")),
        preprocessing=PreprocessingConfig(shortest_side=64, longest_side=64),
        evaluation=evaluation or None,
    )
    file = folder / f"width-{width}.safetensors"
    save_weights(file, build_detector(config, 2), info)
    return file


def test_everyone_is_timed_from_resized_pixels_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, way = made_picture(640, 480), Way("float32", compiled=False, batch=2)
    contender = TorchContender.read("x", _weights(tmp_path, 32), picture, "cpu")
    [expected] = contender.predictor.predict(picture, threshold=0)
    given: list[Any] = []
    normalised = DetectionGraph._normalised

    def noted(self: DetectionGraph, images: torch.Tensor) -> torch.Tensor:
        given.append(images.numpy())
        return normalised(self, images)

    monkeypatch.setattr(DetectionGraph, "_normalised", noted)
    boxes, scores, _ = contender.action(picture, way)()
    np.testing.assert_allclose(scores.numpy(), [expected.scores] * 2, atol=1e-5)
    assert boxes.shape == (2, len(expected), 4) and boxes.max() > 64

    images = ImageSettings("imagenet", 64, 64, None)
    for inside in (True, False):
        about = SimpleNamespace(preprocessing=images, inside=inside, smallest=1)
        run = lambda pixels, sizes: given.append(pixels)  # noqa: E731
        one = ExportContender("x", (48, 64), {}, description=about, runtime="any", run=run)
        one.action(picture, way)()
    assert np.array_equal(given[0], given[1]) and given[1].dtype == np.uint8
    assert given[1].flags.c_contiguous and given[1].shape == (2, 3, 48, 64)
    wanted = normalised(contender.graph, torch.from_numpy(given[1])).numpy()
    np.testing.assert_allclose(given[2], wanted, atol=1e-5)


def test_what_is_compiled_detects_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    picture = made_picture(640, 480)
    contender = TorchContender.read("x", _weights(tmp_path, 32), picture, "cpu")
    eager, compiled = (
        contender.action(picture, Way("float32", compiled=compiled, batch=1))()
        for compiled in (False, True)
    )
    np.testing.assert_allclose(compiled[1].numpy(), eager[1].numpy(), atol=1e-5)


def test_rows_say_size_quality_and_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        _weights(tmp_path, 32, mAP=0.25, data_digest="x"),
        _weights(tmp_path, 64, mAP=0.5, data_digest="y"),
    ]
    picture = tmp_path / "latency.png"
    arguments = ["--batch-sizes", "1", "3", "--rounds", "2", "--picture", str(picture), "--quiet"]
    assert main(["benchmark", *map(str, files), *arguments, "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["detector"], row["batch"]) for row in rows] == [
        ("width-32", 1),
        ("width-32", 3),
        ("width-64", 1),
        ("width-64", 3),
    ]
    # 640 x 480 within sides of 64.
    assert {(row["height"], row["width"]) for row in rows} == {(48, 64)}
    assert rows[0]["mAP"] == 0.25 and rows[0]["operations"] < rows[2]["operations"]
    assert rows[0]["parameters"] < rows[2]["parameters"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["benchmark", *map(str, files), "--rounds", "1", "--quiet"]) == 0
    assert "different data sets" in capsys.readouterr().out


def _run_or_skip(*arguments: str) -> str:
    """What a command prints, run apart: OpenVINO's kernels end the process on some processors."""
    command = [sys.executable, "-m", "d3etr", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGSEGV or "OpenVINO's own code ended" in done.stderr:
        pytest.skip(f"OpenVINO cannot run here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_exported_files_stand_beside_their_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("onnxruntime", "onnxscript", "openvino"):
        pytest.importorskip(package)
    weights = _weights(tmp_path, 32, mAP=0.25, data_digest="x")
    files = {"onnx": "own.onnx", "openvino": "own.xml", "torch-export": "own.pt2"}
    for name, file in files.items():
        _run_or_skip("export", str(weights), str(tmp_path / file), "--format", name)
    about = load_onnx(tmp_path / "own.onnx", "cpu").description
    quantise(tmp_path / "own.onnx", "int8-dynamic", tmp_path / "q.onnx")
    about = replace(about, quantisation={"kind": "int8-dynamic"}, evaluation={})
    OnnxFormat().describe(tmp_path / "q.onnx", about)
    exported = [str(tmp_path / file) for file in (*files.values(), "q.onnx")]
    arguments = ["--rounds", "2", "--threads", "1", "--quiet", "--device", "cpu"]
    answered = json.loads(_run_or_skip("benchmark", str(weights), *exported, *arguments, "--json"))
    rows = answered["rows"]
    assert answered["machine"] and [row["run_as"] for row in rows] == [
        "eager float32",
        "ONNX Runtime float32",
        "OpenVINO float32",
        "torch.export float32",
        "ONNX Runtime int8-dynamic",
    ]
    assert [row["mAP"] for row in rows] == [0.25, 0.25, 0.25, 0.25, None]
    assert [row["detector"] for row in rows][1:] == ["own", "own.xml", "own.pt2", "q"]
    assert {row["width"] for row in rows} == {64} and rows[1]["parameters"] is None
    sizes = [row["file_bytes"] for row in rows]
    assert sizes[0] == weights.stat().st_size and sizes[4] < sizes[1]
    assert sizes[2] == sum((tmp_path / f"own.{x}").stat().st_size for x in ("xml", "bin"))
    assert {row["peak_bytes"] for row in rows} == {None}
    assert main(["benchmark", exported[0], "--precisions", "bfloat16", "--quiet"]) == 2
    assert "exported files run in the numbers that they hold" in capsys.readouterr().err
    (tmp_path / "own.pt2").write_bytes(b"no archive")
    assert main(["benchmark", exported[2], *arguments]) == 2
    assert "PyTorch cannot read it" in capsys.readouterr().err


def test_what_a_cpu_does_not_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(_weights(tmp_path, 32))
    assert main(["benchmark", file, "--device", "cpu", "--precisions", "float16"]) == 2
    assert "expected float32 or bfloat16" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["benchmark", file, "--picture-size", "640"])
    assert "WIDTHxHEIGHT" in capsys.readouterr().err
