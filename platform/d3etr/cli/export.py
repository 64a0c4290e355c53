"""``d3etr export``: a weights file in half the space, or a folder for transformers."""

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
)

if TYPE_CHECKING:
    from d3etr.detectors.base import DetectionTransformer
    from d3etr.detectors.weights import WeightsInfo

OURS, HUGGING_FACE = "d3etr", "hugging-face"
_PLACES: Mapping[str, Any] = MappingProxyType(
    {OURS: file_to_write(".safetensors"), HUGGING_FACE: folder_to_write}
)
"""What may be written to, by format."""


def _add_arguments(parser: ArgumentParser) -> None:
    add_weights(parser)
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        help="what to write: a file (.safetensors), or with --format hugging-face a new folder",
    )
    parser.add_argument(
        "--format",
        choices=[*_PLACES],
        default=OURS,
        help="d3etr (default): a weights file; hugging-face: config.json, model.safetensors and "
        "preprocessor_config.json for AutoModelForObjectDetection of transformers",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="store matrices and kernels as float16; the recorded evaluation is left out, as "
        "it was of other numbers",
    )
    add_json(parser)
    # Where OUTPUT may be depends on --format, so that no type of an argument can tell.
    parser.set_defaults(refuse=parser.error)


def _run(options: Namespace) -> int:
    output = _place(options)
    ensure_other_file(options.weights, output)
    if options.format == HUGGING_FACE:
        from d3etr.detectors.exports.hugging_face import ensure_new
        from d3etr.detectors.foundation import require_transformers

        require_transformers(f"--format {HUGGING_FACE}")  # both before anything is fetched
        ensure_new(output)

    from d3etr.detectors.weights import load_weights
    from d3etr.storage.fetch import local_file

    with local_file(options.weights) as file:
        detector, info = load_weights(file)
    if options.format == HUGGING_FACE:
        return _export_folder(options, output, detector, info)
    return _export_file(options, output, detector, info)


def _place(options: Namespace) -> Path:
    """OUTPUT as the format takes it; anything else ends the program as a wrong argument does."""
    if options.format == HUGGING_FACE and options.half:
        options.refuse(
            f"--half goes with --format {OURS}: let transformers convert, with "
            "from_pretrained(FOLDER, dtype=torch.float16)"
        )
    try:
        place: Path = _PLACES[options.format](options.output)
        return place
    except ArgumentTypeError as error:
        others = " or ".join(f"--format {name}" for name in _PLACES if name != options.format)
        options.refuse(f"argument OUTPUT: {error} (another format: {others})")
        raise  # not reached


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


COMMAND = Command(
    "export",
    "copy a weights file, in half the space if asked to, or as a folder for transformers",
    _add_arguments,
    _run,
)
