"""A traced detector as OpenVINO's pair of files: .xml, and weights in .bin beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d3etr.errors import UserError
from d3etr.exports.comparison import Detected
from d3etr.exports.description import INPUTS, METADATA_KEYS, OUTPUTS, Description
from d3etr.exports.formats import Runner, require_package
from d3etr.exports.graph import Traced
from d3etr.exports.onnx_file import OPSET, to_onnx


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
        return load_openvino(path)[1]


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
