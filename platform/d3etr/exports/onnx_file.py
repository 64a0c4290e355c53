"""A traced detector as an ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from d3etr.errors import UserError
from d3etr.exports.comparison import Detected
from d3etr.exports.description import INPUTS, OUTPUTS, Description
from d3etr.exports.formats import Runner, require_package
from d3etr.exports.graph import Traced

OPSET = 18
"""Runtimes of 2023 and later read it."""
WEIGHT = "d3etr.weight"
"""Metadata of a node: the parameter that it multiplies by, as PyTorch's graph names it."""
_TRACED_NODE = "pkg.torch.onnx.fx_node"
_PARAMETER = re.compile(r"%p_(\w+_weight)\b")


class OnnxFormat:
    """ONNX, compared in ONNX Runtime on the CPU.

    Args:
        opset: of the file.
    """

    name = "onnx"
    packages: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
    few_by_gathers = False

    def __init__(self, opset: int = OPSET) -> None:
        self.opset: int | None = opset

    def write(self, traced: Traced, description: Description, path: Path) -> None:
        """As of ``GraphFormat``."""
        onnx = require_package("onnx", self.name)
        model = to_onnx(traced, self.opset or OPSET)
        onnx.checker.check_model(model)
        onnx.save(model, str(path))
        self.describe(path, description)

    def describe(self, path: Path, description: Description) -> None:
        """Replace the metadata of an ONNX file."""
        onnx = require_package("onnx", self.name)
        model = onnx.load(str(path))
        onnx.helper.set_model_props(model, description.as_metadata())
        onnx.save(model, str(path))

    def open(self, path: Path) -> Runner:
        """As of ``GraphFormat``."""
        runtime = require_package("onnxruntime", self.name)
        session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

        def run(images: Any, sizes: Any) -> Detected:
            return Detected(*session.run(list(OUTPUTS), {"images": images, "sizes": sizes}))

        return run


def to_onnx(traced: Traced, opset: int) -> Any:
    """The model as ``onnx.ModelProto``, with names for inputs, outputs and free dimensions.

    Raises:
        UserError: an operator that ONNX has no counterpart of.
    """
    require_package("onnxscript", "onnx")
    try:
        with _quiet():
            program = torch.onnx.export(
                traced.program,
                traced.example,
                dynamo=True,
                opset_version=opset,
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                verbose=False,
            )
        assert program is not None
        model: Any = program.model_proto
    except Exception as error:  # the exporter has errors of many types
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"PyTorch cannot write this detector as ONNX: {first}") from error
    _name_dimensions(model)
    _shorten_metadata(model)
    return model


def _shorten_metadata(model: Any) -> None:
    """Keep of each node's metadata the name of its weight.

    The exporter's are stack traces, with the paths of this machine, and a tenth of a small file.
    """
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        traced = next((x.value for x in node.metadata_props if x.key == _TRACED_NODE), "")
        del node.metadata_props[:]
        if found := _PARAMETER.search(traced):
            node.metadata_props.add(key=WEIGHT, value=found[1])


def _name_dimensions(model: Any) -> None:
    """Free dimensions by the names that people know; those within are for runtimes to infer."""
    graph = model.graph
    del graph.value_info[:]
    names: dict[str, str] = {}
    for place, name in ((0, "batch"), (2, "height"), (3, "width")):
        symbol = graph.input[0].type.tensor_type.shape.dim[place].dim_param
        if symbol:
            names[symbol] = name
    for value in (*graph.input, *graph.output):
        for place, dimension in enumerate(value.type.tensor_type.shape.dim):
            if not dimension.dim_param:
                continue
            # The number of detections may be an expression in the images' sides.
            other = "detections" if place else "batch"
            dimension.dim_param = names.get(dimension.dim_param, other)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter prints about its own steps."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
