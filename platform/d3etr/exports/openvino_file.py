"""A traced detector as OpenVINO's pair of files: .xml, and weights in .bin beside it."""

from __future__ import annotations

from pathlib import Path

from d3etr.exports.description import Description
from d3etr.exports.formats import Runner, require_package
from d3etr.exports.graph import Traced
from d3etr.exports.onnx_file import OPSET, to_onnx
from d3etr.exports.openvino_runtime import OpenVinoProcess


class OpenVinoFormat:
    """OpenVINO's intermediate representation in float32, compared on the CPU.

    Args:
        opset: of the ONNX model that it is converted from.
    """

    name = "openvino"
    packages: tuple[str, ...] = ("openvino", "onnx", "onnxscript")
    few_by_gathers = True

    def __init__(self, opset: int = OPSET) -> None:
        self.opset: int | None = opset

    def write(self, traced: Traced, description: Description, path: Path) -> None:
        """As of ``GraphFormat``."""
        openvino = require_package("openvino", self.name)
        source = path.with_suffix(".onnx")
        source.write_bytes(to_onnx(traced, self.opset or OPSET).SerializeToString())
        try:
            model = openvino.convert_model(str(source))
            for key, value in description.as_metadata().items():
                model.set_rt_info(value, key.split("."))
            openvino.save_model(model, str(path), compress_to_fp16=False)
        finally:
            source.unlink()

    def open(self, path: Path) -> Runner:
        """As of ``GraphFormat``."""
        require_package("openvino", self.name)
        return OpenVinoProcess(path)
