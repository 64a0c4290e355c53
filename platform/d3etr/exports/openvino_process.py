"""OpenVINO in a process of its own, because its kernels have ended processes on some processors.

``python -m d3etr.exports.openvino_process MODEL.xml`` answers what comes on its standard input, one
pickled (images, sizes) after the other, by (boxes, scores, labels) on its standard output. It ends
with its input.
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
from d3etr.exports.description import OUTPUTS

_EXACT = {"INFERENCE_PRECISION_HINT": "f32"}  # some processors would take bfloat16


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

    def __call__(self, images: Any, sizes: Any) -> tuple[Any, Any, Any]:
        """Detect in NumPy arrays: images [B, 3, h, w], sizes [B, 2].

        Raises:
            UserError: the process has ended.
        """
        ask, answer = self._process.stdin, self._process.stdout
        assert ask is not None and answer is not None
        try:
            pickle.dump((images, sizes), ask)
            ask.flush()
            boxes, scores, labels = pickle.load(answer)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise UserError(
                f"OpenVINO's own code ended with {reason} when it ran the model on this "
                "processor: export on another machine, or take --format onnx"
            ) from error
        return boxes, scores, labels


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:  # it ended with something unread
                pass
    process.wait()


def _answer(path: str, asked: IO[bytes], answers: IO[bytes]) -> None:
    import openvino

    model = openvino.Core().compile_model(path, "CPU", _EXACT)
    while True:
        try:
            images, sizes = pickle.load(asked)
        except EOFError:
            return
        found = model({"images": images, "sizes": sizes})
        pickle.dump(tuple(found[name] for name in OUTPUTS), answers)
        answers.flush()


if __name__ == "__main__":
    # What OpenVINO prints must not come between the answers.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        _answer(sys.argv[1], sys.stdin.buffer, answers)
