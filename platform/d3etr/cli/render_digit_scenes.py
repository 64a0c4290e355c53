"""``d3etr render-digit-scenes``: write the embedded benchmark as a COCO-format folder."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from d3etr.cli.command import Command, add_json, add_overrides, answer
from d3etr.cli.progress import progress_bar


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--root", type=Path, metavar="FOLDER", help="parent folder (default data/digit-scenes)"
    )
    add_overrides(parser)
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.config.data import DigitScenesConfig
    from d3etr.config.load import validate_section
    from d3etr.config.overrides import as_overrides
    from d3etr.data.digit_scenes import VERSION, write_digit_scenes

    root = [] if options.root is None else as_overrides({"root": options.root})
    overrides = [*root, *options.overrides]
    config = validate_section(
        DigitScenesConfig, {}, "the settings", overrides, below="data.digit_scenes"
    )
    with progress_bar() as progress:
        splits = write_digit_scenes(config, progress)
    paths = {
        name: {"images": str(split.images), "annotations": str(split.annotations)}
        for name, split in splits.items()
    }
    text = "\n".join(f"{name:<12}{split.annotations}" for name, split in splits.items())
    answer(options, {"version": VERSION, "splits": paths}, text)
    return 0


COMMAND = Command(
    "render-digit-scenes",
    "write the embedded benchmark, for example with --set train_images=500",
    _add_arguments,
    _run,
)
