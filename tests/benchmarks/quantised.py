"""A smaller student or a quantised teacher: mAP, size and latency of exports on digit scenes.

    PYTHONPATH=platform:tests python -m benchmarks.quantised teacher.onnx student.onnx

The files are float32 exports. Calibration is on training scenes, mAP on test scenes (300 of them),
latency of all files in turns in one process, one thread, by the clock
and in CPU time. Quantised files are written beside.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from PIL import Image

from benchmarks.machine import described, machine
from d3etr.config.data import DigitScenesConfig
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.data.record_images import record_image
from d3etr.data.splits import DetectionSplit, read_split
from d3etr.exports.calibration import calibration_inputs, chosen
from d3etr.exports.description import Quantisation
from d3etr.exports.measuring import measure as evaluate
from d3etr.exports.onnx_file import OnnxFormat
from d3etr.exports.onnx_predictor import load_onnx
from d3etr.exports.quantisation import quantise
from d3etr.latency.contenders import Way
from d3etr.latency.exported import ExportContender
from d3etr.latency.measure import measure
from d3etr.progress import no_progress

ROUNDS = 60
CPU = torch.device("cpu")


def main(arguments: list[str]) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FLOAT32.onnx")
    parser.add_argument("--root", type=Path, default=Path("data/digit-scenes"))
    options = parser.parse_args(arguments)
    found = machine()
    config = DigitScenesConfig(
        root=options.root, train_images=1000, validation_images=300, test_images=300
    )
    places = write_digit_scenes(config)
    train, test = (read_split(name, places[name]) for name in ("train", "test"))
    files = [each for file in options.files for each in (file, *_quantised(file, train))]
    timings = timed(files, record_image(test, test.records[0]))
    print("| file | mAP % | MB | p50 ms | CPU ms |\n| --- | ---: | ---: | ---: | ---: |")
    for file in files:
        metrics = evaluate(load_onnx(file, "cpu", 1), test, 16, 100, no_progress).metrics
        mAP, size = 100 * (metrics.values["mAP"] or 0.0), file.stat().st_size / 1e6
        wall, cpu = timings[file]
        print(f"| {file.stem} | {mAP:.1f} | {size:.2f} | {wall:.1f} | {cpu:.1f} |")
    print(f"\n{described(found)}")


def timed(files: Sequence[Path], picture: Image.Image) -> dict[Path, tuple[float, float]]:
    """Medians of wall and CPU milliseconds of an image, in turns, one thread.

    CPU time is what other programs of a busy machine disturb less.
    """
    way, cpu = Way("float32", compiled=False, batch=1), dict[str, list[float]]()

    def counted(file: Path) -> Callable[[], object]:
        contender = ExportContender.read(file.stem, file, picture, CPU, 1)
        action, taken = contender.action(picture, way), cpu.setdefault(str(file), [])
        assert action is not None

        def act() -> None:
            begun = time.process_time()
            action()
            taken.append(1000 * (time.process_time() - begun))

        return act

    found = measure({str(file): (counted(file), 1) for file in files}, CPU, ROUNDS)
    return {file: (found[str(file)].median, statistics.median(cpu[str(file)])) for file in files}


def _quantised(file: Path, train: DetectionSplit) -> list[Path]:
    precise, written = load_onnx(file, "cpu", 1), []
    for kind in get_args(Quantisation):
        target = file.with_name(f"{file.stem}-{kind}.onnx")
        inputs = calibration_inputs(precise, train, chosen(train))
        quantise(file, kind, target, inputs if kind == "int8-static" else ())
        about = replace(precise.description, quantisation={"kind": kind}, evaluation={})
        OnnxFormat().describe(target, about)
        written.append(target)
    return written


if __name__ == "__main__":
    main(sys.argv[1:])
