"""``d3etr export``: a weights file in half the space, to ship."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from d3etr.cli.command import (
    Command,
    add_json,
    add_weights,
    answer,
    ensure_other_file,
    file_to_write,
)


def _add_arguments(parser: ArgumentParser) -> None:
    add_weights(parser)
    parser.add_argument(
        "output",
        type=file_to_write(".safetensors"),
        metavar="OUTPUT",
        help="the file to write (.safetensors)",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="store matrices and kernels as float16; the recorded evaluation is left out, as "
        "it was of other numbers",
    )
    add_json(parser)


def _run(options: Namespace) -> int:
    import torch

    from d3etr.detectors.weights import load_weights, save_weights
    from d3etr.storage.fetch import local_file

    ensure_other_file(options.weights, options.output)
    with local_file(options.weights) as file:
        detector, info = load_weights(file)
    if options.half:
        info = info.model_copy(update={"evaluation": None})
    save_weights(options.output, detector, info, torch.float16 if options.half else None)
    size = options.output.stat().st_size
    value = {"output": str(options.output), "bytes": size}
    answer(options, value, f"{options.output}: {size / 1e6:.1f} MB")
    return 0


COMMAND = Command(
    "export", "copy a weights file, in half the space if asked to", _add_arguments, _run
)
