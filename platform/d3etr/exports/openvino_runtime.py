"""Detecting with an OpenVINO file, here or in a process of its own.

OpenVINO's kernels have ended processes on some processors. ``python -m
d3etr.exports.openvino_runtime MODEL.xml`` answers what comes on its standard input, one pickled
(images, sizes) after the other, by (boxes, scores, labels) on its standard output. It ends with its
input.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import IO, Any

from d3etr.errors import UserError
from d3etr.exports.comparison import Detected
from d3etr.exports.description import INPUTS, METADATA_KEYS, OUTPUTS, Description
from d3etr.exports.formats import Runner, require_package


def load_openvino(path: Path, threads: int | None = None) -> tuple[Description, Runner]:
    """Open a file of ``d3etr export``, in float32 on the CPU.

    Args:
        path: of the ``.xml`` file; its weights lie beside it.
        threads: of the CPU; None: OpenVINO's own choice.

    Raises:
        UserError: OpenVINO or the file is missing, or the file is damaged or not d3etr's.
    """
    openvino = require_package("openvino", "openvino")
    hints: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}  # else bfloat16 on some processors
    if threads is not None:
        hints["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    try:
        model = core.read_model(str(path))
        compiled = core.compile_model(model, "CPU", hints)
        places = {key: key.split(".") for key in METADATA_KEYS}
        metadata = {
            key: model.get_rt_info(place).astype(str)
            for key, place in places.items()
            if model.has_rt_info(place)
        }
    except Exception as error:  # the runtime has errors of many types
        raise _unreadable(path, error) from error

    def run(images: Any, sizes: Any) -> Detected:
        found = compiled(dict(zip(INPUTS, (images, sizes), strict=True)))
        return Detected(*(found[name] for name in OUTPUTS))

    return Description.from_metadata(metadata, str(path)), run


def _unreadable(path: Path, error: Exception) -> UserError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"{path}: OpenVINO cannot read it ({first}). Expected a .xml file of d3etr export with its "
        ".bin beside it: copy both again, or export again"
    )


class OpenVinoProcess:
    """A model that another process runs.

    Args:
        path: of the model's .xml.

    Attributes:
        pid: of the process.
    """

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-m", __name__, str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self._process.pid
        weakref.finalize(self, _end, self._process)

    def __call__(self, images: Any, sizes: Any) -> Detected:
        """Detect in NumPy arrays: images [B, 3, h, w], sizes [B, 2].

        Raises:
            UserError: the process has ended.
        """
        ask, answer = self._process.stdin, self._process.stdout
        assert ask is not None and answer is not None
        try:
            pickle.dump((images, sizes), ask)
            ask.flush()
            return Detected(*pickle.load(answer))
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise UserError(
                f"OpenVINO's own code ended with {reason} when it ran the model on this "
                "processor: export on another machine, or take --format onnx"
            ) from error


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:  # it ended with something unread
                pass
    process.wait()


def _answer(path: str, asked: IO[bytes], answers: IO[bytes]) -> None:
    detect = load_openvino(Path(path))[1]
    while True:
        try:
            images, sizes = pickle.load(asked)
        except EOFError:
            return
        pickle.dump(tuple(detect(images, sizes)), answers)
        answers.flush()


if __name__ == "__main__":
    # What OpenVINO prints must not come between the answers.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        _answer(sys.argv[1], sys.stdin.buffer, answers)
