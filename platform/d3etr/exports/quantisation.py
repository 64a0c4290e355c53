"""An exported ONNX file in smaller numbers, by ONNX Runtime's own tools.

Which parts stay in float32 is our choice; docs/deploy.md has what that costs and saves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from d3etr.errors import UserError
from d3etr.exports.description import Quantisation
from d3etr.exports.formats import require_package
from d3etr.exports.onnx_file import WEIGHT

Inputs = Mapping[str, Any]
"""What a graph takes: arrays by name."""
_PRODUCTS = ("MatMul", "Gemm")
_HEADS = ("box_head", "class_head")
"""Parts of names of parameters whose products stay in float32: they are small, and errors of boxes
are in pixels."""
_DELICATE = (
    *("GridSample", "Log", "Exp", "Sin", "Cos", "Pow", "Sqrt", "ReduceMean", "ReduceSum"),
    *("InstanceNormalization", "LayerNormalization", "Sigmoid", "Softmax", "Floor", "Mod"),
    *("Div", "Sub", "GatherElements", "IsInf", "IsNaN"),
)
"""Operators that stay in float32 beside those that ONNX Runtime's converter leaves: places in
pixels or cells, logarithms of references, sums of many squares."""


def quantise(
    source: Path,
    kind: Quantisation,
    target: Path,
    calibration: Iterable[Inputs] = (),
) -> None:
    """Write a file in smaller numbers.

    Matrices of int8 have a scale for each column, convolutions for each channel. ``int8-dynamic``
    measures activations while it runs and leaves convolutions alone, which ONNX Runtime runs
    slowly in integers; ``int8-static`` takes their ranges from ``calibration``.

    Args:
        source: the float32 file of ``OnnxFormat``.
        kind: of numbers.
        target: where to; its metadata are not d3etr's yet.
        calibration: inputs of typical images, for ``int8-static``.

    Raises:
        UserError: ONNX Runtime's tools cannot do it.
    """
    onnx = require_package("onnx", "onnx")
    model = onnx.load(str(source))
    try:
        with _quiet():
            if kind == "float16":
                onnx.save(_halved(model), str(target))
            else:
                _to_integers(model, kind, target, calibration)
    except UserError:
        raise
    except Exception as error:  # the tools have errors of many types
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"ONNX Runtime cannot quantise this detector as {kind}: {first}") from error


def _to_integers(
    model: Any, kind: Quantisation, target: Path, calibration: Iterable[Inputs]
) -> None:
    tools = import_module("onnxruntime.quantization")
    import_module("onnxruntime.quantization.quant_utils").add_pre_process_metadata(model)
    shared: dict[str, Any] = {
        "per_channel": True,
        "weight_type": tools.QuantType.QInt8,
        "nodes_to_exclude": [*_heads(model), *_by_vectors(model)],
        # Products of two activations, as in attention, stay in float32.
        "extra_options": {"MatMulConstBOnly": True},
    }
    if kind == "int8-dynamic":
        tools.quantize_dynamic(model, target, op_types_to_quantize=[*_PRODUCTS], **shared)
        return
    tools.quantize_static(
        model,
        target,
        _Reader(calibration),
        quant_format=tools.QuantFormat.QDQ,
        activation_type=tools.QuantType.QUInt8,
        op_types_to_quantize=[*_PRODUCTS, "Conv"],
        **shared,
    )


class _Reader:
    """Calibration inputs as ONNX Runtime asks for them, one after another."""

    def __init__(self, inputs: Iterable[Inputs]) -> None:
        self._inputs = iter(inputs)

    def get_next(self) -> Inputs | None:
        """The next ones; None at the end."""
        return next(self._inputs, None)

    def __iter__(self) -> Iterator[Inputs]:
        return self._inputs


def _heads(model: Any) -> list[str]:
    """Names of the nodes that multiply by the weights of heads."""
    return [
        node.name
        for node in model.graph.node
        if any(x.key == WEIGHT and any(h in x.value for h in _HEADS) for x in node.metadata_props)
    ]


def _by_vectors(model: Any) -> list[str]:
    """Names of products with a constant that is no matrix, which have no columns."""
    dimensions = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    return [n.name for n in products if any(dimensions.get(x, 2) != 2 for x in n.input)]


def _halved(model: Any) -> Any:
    tools = import_module("onnxruntime.transformers.float16")
    kept = [*tools.DEFAULT_OP_BLOCK_LIST, *_DELICATE]
    return tools.convert_float_to_float16(model, keep_io_types=True, op_block_list=kept)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tools' remarks, which they log as the root logger's."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
