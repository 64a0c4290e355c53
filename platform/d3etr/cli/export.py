"""``d3etr export``: a weights file in half the space, or a detector for other programs."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from d3etr.cli.command import (
    Command,
    add_json,
    add_weights,
    answer,
    ensure_other_file,
    file_to_write,
    folder_to_write,
    positive,
    whole_number,
)
from d3etr.cli.progress import progress_bar
from d3etr.cli.quantise import (
    add_quantise_arguments,
    in_words,
    quantised_settings,
    refuse_without_effect,
)

if TYPE_CHECKING:
    from d3etr.detectors.base import DetectionTransformer
    from d3etr.detectors.weights import WeightsInfo
    from d3etr.exports.formats import GraphFormat
    from d3etr.exports.graph import GraphSettings

OURS, HUGGING_FACE = "d3etr", "hugging-face"
ONNX, TORCH_EXPORT, OPENVINO = "onnx", "torch-export", "openvino"
GRAPHS = (ONNX, TORCH_EXPORT, OPENVINO)
"""Formats that hold a graph from pixels to boxes."""
_SUFFIXES: Mapping[str, str] = MappingProxyType(
    {OURS: ".safetensors", ONNX: ".onnx", TORCH_EXPORT: ".pt2", OPENVINO: ".xml"}
)
"""Of the file that each format writes; hugging-face writes a folder."""
_OPSETS = (18, 23)
_OF_GRAPHS = ("preprocessing", "sampling", "detections", "size", "opset", "pictures")
"""Arguments that only formats with a graph have."""


def _add_arguments(parser: ArgumentParser) -> None:
    add_weights(parser)
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        help="what to write: a file that ends as its format does (.safetensors, .onnx, .pt2, "
        ".xml), or with --format hugging-face a new folder",
    )
    parser.add_argument(
        "--format",
        choices=[*_SUFFIXES, HUGGING_FACE],
        default=OURS,
        help="d3etr (default): a weights file; onnx, torch-export, openvino: one graph from pixels "
        "to boxes, scores and labels, compared with the detector before it is kept; hugging-face: "
        "config.json, model.safetensors and preprocessor_config.json for "
        "AutoModelForObjectDetection of transformers",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="store matrices and kernels as float16; the recorded evaluation is left out, as "
        "it was of other numbers",
    )
    _add_graph_arguments(parser)
    add_quantise_arguments(parser)
    add_json(parser)
    # Where OUTPUT may be depends on --format, so that no type of an argument can tell.
    parser.set_defaults(refuse=parser.error)


def _add_graph_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("graphs", "for --format " + ", ".join(GRAPHS))
    group.add_argument(
        "--preprocessing",
        choices=("inside", "outside"),
        help="inside (default): the graph takes uint8 RGB pixels and normalises them; outside: it "
        "takes normalised float32",
    )
    group.add_argument(
        "--sampling",
        choices=("grid-sample", "gather"),
        help="how deformable attention reads values: by one operator, or by gathers, for runtimes "
        "whose operator is slow or wrong (default: what is faster)",
    )
    group.add_argument(
        "--detections", type=positive, metavar="K", help="of each image at most (default 300)"
    )
    group.add_argument(
        "--size",
        type=positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="fixed size that images are stretched to; default: exact_size of the weights' "
        "preprocessing, else any size",
    )
    group.add_argument(
        "--opset",
        type=whole_number(*_OPSETS),
        metavar="N",
        help=f"of ONNX, {_OPSETS[0]} (default) to {_OPSETS[1]}",
    )
    group.add_argument(
        "--pictures",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="pictures to compare by (default: parts of two photographs)",
    )


def _run(options: Namespace) -> int:
    output = _place(options)
    ensure_other_file(options.weights, output)
    _ensure_possible(options, output)  # before anything is fetched

    from d3etr.config.arguments import require_location
    from d3etr.detectors.weights import load_weights
    from d3etr.loading import weights_place
    from d3etr.storage.fetch import local_file

    with (
        weights_place(options.weights) as place,
        local_file(require_location("WEIGHTS", place)) as file,
    ):
        detector, info = load_weights(file)
    if options.format == HUGGING_FACE:
        return _export_folder(options, output, detector, info)
    if options.quantise is not None:
        return _export_quantised(options, output, detector, info)
    if options.format in GRAPHS:
        return _export_graph(options, output, detector, info)
    return _export_file(options, output, detector, info)


def _place(options: Namespace) -> Path:
    """OUTPUT as the format takes it; anything else ends the program as a wrong argument does."""
    chosen = options.format
    if chosen == HUGGING_FACE and options.half:
        options.refuse(
            f"--half goes with --format {OURS}: let transformers convert, with "
            "from_pretrained(FOLDER, dtype=torch.float16)"
        )
    if options.half and chosen in GRAPHS:
        options.refuse(f"--half goes with --format {OURS}, not with {chosen}")
    for name in _OF_GRAPHS:
        if getattr(options, name) is not None and chosen not in GRAPHS:
            options.refuse(f"--{name} goes with --format {' or '.join(GRAPHS)}, not with {chosen}")
    refuse_without_effect(options, chosen == ONNX)
    if options.opset is not None and chosen == TORCH_EXPORT:
        options.refuse(f"--opset goes with --format {ONNX} or {OPENVINO}, not with {chosen}")
    parse = file_to_write(_SUFFIXES[chosen]) if chosen in _SUFFIXES else folder_to_write
    try:
        return parse(options.output)
    except ArgumentTypeError as error:
        options.refuse(f"argument OUTPUT: {error} ({_hint(options)})")
        raise  # not reached


def _hint(options: Namespace) -> str:
    """The format that OUTPUT's suffix belongs to, or all others."""
    suffix = Path(str(options.output)).suffix.lower()
    meant = [name for name, own in _SUFFIXES.items() if own == suffix and name != options.format]
    if meant:
        return f"{suffix} is what --format {meant[0]} writes"
    others = [name for name in (*_SUFFIXES, HUGGING_FACE) if name != options.format]
    return "another format: " + " or ".join(f"--format {name}" for name in others)


def _ensure_possible(options: Namespace, output: Path) -> None:
    """Refuse what lacks a package or a free place.

    Raises:
        UserError: it does.
    """
    if options.format == HUGGING_FACE:
        from d3etr.detectors.exports.hugging_face import ensure_new
        from d3etr.detectors.foundation import require_transformers

        require_transformers(f"--format {HUGGING_FACE}")
        ensure_new(output)
    elif options.format in GRAPHS:
        from d3etr.exports.formats import require_package

        kind = _kind(options)
        for package in kind.packages:
            require_package(package, kind.name)


def _kind(options: Namespace) -> GraphFormat:
    from d3etr.exports.onnx_file import OPSET, OnnxFormat
    from d3etr.exports.openvino_file import OpenVinoFormat
    from d3etr.exports.torch_export import TorchExportFormat

    if options.format == TORCH_EXPORT:
        return TorchExportFormat()
    kind = OnnxFormat if options.format == ONNX else OpenVinoFormat
    return kind(options.opset or OPSET)


def _export_file(
    options: Namespace, output: Path, detector: DetectionTransformer, info: WeightsInfo
) -> int:
    import torch

    from d3etr.detectors.weights import THRESHOLD, save_weights

    if options.half:
        # mAP was that of other numbers; the threshold is no measurement to compare by.
        kept = {k: v for k, v in (info.evaluation or {}).items() if k == THRESHOLD}
        info = info.model_copy(update={"evaluation": kept or None})
    save_weights(output, detector, info, torch.float16 if options.half else None)
    size = output.stat().st_size
    answer(options, {"output": str(output), "bytes": size}, f"{output}: {size / 1e6:.1f} MB")
    return 0


def _export_folder(
    options: Namespace, output: Path, detector: DetectionTransformer, info: WeightsInfo
) -> int:
    from d3etr.detectors.exports.hugging_face import export_folder

    files = export_folder(output, detector, info)
    names, size = [file.name for file in files], sum(file.stat().st_size for file in files)
    value = {"output": str(output), "bytes": size, "files": names}
    answer(options, value, f"{output}: {size / 1e6:.1f} MB in {', '.join(names)}")
    return 0


def _export_graph(
    options: Namespace, output: Path, detector: DetectionTransformer, info: WeightsInfo
) -> int:
    from d3etr.exports.export import export_graph

    kind, pictures = _kind(options), options.pictures or ()
    with progress_bar() as progress:
        done = export_graph(output, detector, info, _settings(options), kind, pictures, progress)
    found, description, size = done.comparison, done.description, output.stat().st_size
    value: dict[str, Any] = {
        "output": str(output),
        "bytes": size,
        "pictures": found.images,
        "detections": found.detections,
        "box_difference": found.box_difference,
        "score_difference": found.score_difference,
        "near_ties": found.near_ties,
    }
    shape = "any size" if description.size is None else "{} x {} pixels".format(*description.size)
    text = (
        f"{output}: {size / 1e6:.1f} MB, for batches of images of {shape}; as in PyTorch on "
        f"{found.images} pictures: {found}"
    )
    answer(options, value, text)
    return 0


def _export_quantised(
    options: Namespace, output: Path, detector: DetectionTransformer, info: WeightsInfo
) -> int:
    from d3etr.exports.onnx_file import OPSET, OnnxFormat
    from d3etr.exports.quantised_export import as_json, export_quantised

    kind, pictures = OnnxFormat(options.opset or OPSET), options.pictures or ()
    with progress_bar() as progress:
        wanted = quantised_settings(options, info, progress)
        done = export_quantised(
            output, detector, info, _settings(options), kind, wanted, pictures, progress
        )
    size = output.stat().st_size
    value = {"output": str(output), "bytes": size, **as_json(done)}
    answer(options, value, f"{output}: {in_words(done, size)}")
    return 0


def _settings(options: Namespace) -> GraphSettings:
    from d3etr.exports.graph import GraphSettings

    own = GraphSettings()
    return GraphSettings(
        inside=options.preprocessing != "outside",
        size=None if options.size is None else tuple(options.size),
        detections=options.detections or own.detections,
        sampling=options.sampling,
    )


COMMAND = Command(
    "export",
    "copy a weights file, in half the space if asked to, or write a detector for other programs",
    _add_arguments,
    _run,
)
