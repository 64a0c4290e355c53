"""``d3etr benchmark``: latency of trained detectors, side by side, beside their mAP."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d3etr.cli.command import (
    Command,
    add_device,
    add_json,
    ensure_writable,
    file_to_write,
    location,
    positive,
    print_json,
    writing,
)
from d3etr.cli.progress import print_progress
from d3etr.errors import UserError
from d3etr.progress import no_progress
from d3etr.text import printable, styled

if TYPE_CHECKING:
    from d3etr.latency.report import Row

WIDTH = 150
PRECISIONS = ("float32", "bfloat16", "float16")
LARGEST_SIDE = 16_384


def _size(text: str) -> tuple[int, int]:
    """Type of an argument such as 640x480."""
    parts = text.lower().split("x")
    if len(parts) == 2 and all(part.isdecimal() and len(part) <= 5 for part in parts):
        width, height = map(int, parts)
        if 1 <= width <= LARGEST_SIDE and 1 <= height <= LARGEST_SIDE:
            return width, height
    raise ArgumentTypeError(f"found '{text}', expected WIDTHxHEIGHT in pixels, such as 640x480")


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "weights",
        nargs="+",
        type=location,
        metavar="WEIGHTS",
        help="weights files of teacher and students, or their URLs; exported .onnx, .xml and .pt2 "
        "files",
    )
    parser.add_argument(
        "--picture-size",
        type=_size,
        default=(640, 480),
        metavar="WxH",
        help="of the picture that each detector resizes as it was trained (default 640x480)",
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=positive, default=[1], metavar="N", help="(default 1)"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["float32"], help="(default float32)"
    )
    parser.add_argument("--compile", action="store_true", help="each by torch.compile too")
    parser.add_argument(
        "--rounds", type=positive, default=30, metavar="N", help="turns of each (default 30)"
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="of the CPU (default: all cores)"
    )
    parser.add_argument(
        "--picture",
        type=file_to_write(".png", ".svg"),
        metavar="FILE",
        help="draw mAP over milliseconds",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_device(parser)
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.latency.measure import processor
    from d3etr.latency.report import draw, notes, table

    if options.picture is not None:
        ensure_writable(options.picture)
    rows, device = _measured(options)
    if options.picture is not None:
        with writing(options.picture):
            draw(rows, options.picture, device)
    if options.json:
        print_json(
            {"device": device, "machine": processor(), "rows": [row.as_json() for row in rows]}
        )
        return 0
    from rich.console import Console

    # A pipe has no width: rich would cut the table for 80 columns.
    console = Console(file=styled(sys.stdout), width=None if sys.stdout.isatty() else WIDTH)
    console.print(table(rows, device).as_rich())
    for line in notes(rows):
        print(printable(line))
    if options.picture is not None:
        print(f"picture: {options.picture}")
    return 0


def _measured(options: Namespace) -> tuple[Sequence[Row], str]:
    """Rows in the order given, and the device in words."""
    import torch

    from d3etr.data.allocator import keep_freed_memory
    from d3etr.inference import usable_device
    from d3etr.latency.contenders import TorchContender, Way, made_picture, named
    from d3etr.latency.exported import RUNTIMES, ExportContender
    from d3etr.latency.measure import measure
    from d3etr.latency.report import Row

    keep_freed_memory()
    device = usable_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    picture = made_picture(*options.picture_size)
    detectors = [
        ExportContender.read(name, file, picture, device, torch.get_num_threads())
        if isinstance(file, Path) and file.suffix.lower() in RUNTIMES
        else TorchContender.read(name, file, picture, str(device))
        for name, file in named(options.weights).items()
    ]
    ways = [
        Way(precision, compiled, batch)
        for precision in dict.fromkeys(options.precisions)
        for compiled in ((False, True) if options.compile else (False,))
        for batch in dict.fromkeys(options.batch_sizes)
    ]
    pairs = {
        f"{d.name}, {d.run_as(way)}, {way.batch} at once": (d, way, action)
        for d in detectors
        for way in ways
        if (action := d.action(picture, way)) is not None
    }
    if not pairs:
        raise UserError(
            "none of these files runs in these precisions: exported files run in the numbers "
            "that they hold; expected --precisions float32, or weights files too"
        )
    timings = measure(
        {name: (action, way.batch) for name, (_, way, action) in pairs.items()},
        device,
        options.rounds,
        no_progress if options.quiet else print_progress,
    )
    rows = [Row(*pairs[name][:2], timing) for name, timing in timings.items()]
    if device.type == "cuda":
        return rows, torch.cuda.get_device_name(device)
    return rows, f"CPU, {torch.get_num_threads()} threads"


COMMAND = Command(
    "benchmark", "latency of trained detectors side by side, beside their mAP", _add_arguments, _run
)
