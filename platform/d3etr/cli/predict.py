"""``d3etr predict``: detect objects on pictures."""

from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3etr.cli.command import (
    SOME_FAILED,
    Command,
    add_device,
    add_json,
    add_weights,
    complain,
    fraction,
    print_json,
    whole_number,
    writing,
)
from d3etr.cli.progress import progress_bar
from d3etr.errors import UserError
from d3etr.files import atomic_write
from d3etr.text import printable

if TYPE_CHECKING:
    from d3etr.predictions import Detections, ImagePredictor

SMALLEST_TILE, LARGEST_TILE, MOST_OVERLAP = 16, 100_000, 0.9
"""As in ``predictions``, which is slow to import."""


def _add_arguments(parser: ArgumentParser) -> None:
    add_weights(parser, ", an ONNX file of d3etr export")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="picture files, or folders of them"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write each picture with its boxes there, as PNG",
    )
    parser.add_argument(
        "--threshold",
        type=fraction,
        help="lowest score (default: that of the weights, with the highest F1 on validation; else "
        "0.5)",
    )
    parser.add_argument(
        "--tiles",
        nargs="?",
        const=True,
        default=False,
        type=whole_number(SMALLEST_TILE, LARGEST_TILE),
        metavar="SIZE",
        help="also look at overlapping tiles of large pictures, of SIZE pixels (default: as large "
        "as the detector sees); after the pictures",
    )
    parser.add_argument(
        "--tile-overlap",
        type=_overlap,
        metavar="SHARE",
        help="of a tile's side that neighbours have in common at least (default 0.2)",
    )
    add_device(parser)
    add_json(parser)


def _overlap(text: str) -> float:
    """Type of an argument."""
    share = fraction(text)
    if share > MOST_OVERLAP:
        raise ArgumentTypeError(f"found '{text}', expected at most {MOST_OVERLAP}")
    return share


def _run(options: Namespace) -> int:
    from d3etr.loading import load

    if options.tile_overlap is not None and options.tiles is False:
        raise UserError("--tile-overlap has no effect without --tiles: add it, or leave this out")
    predictor = load(options.weights, options.device)
    paths, problems = _pictures(options.images)
    targets = _targets(paths, options.output)
    results: list[dict[str, Any]] = []
    with progress_bar() as progress:
        for done, path in enumerate(paths, start=1):
            results.append(_answer(predictor, path, targets.get(path), options))
            progress("pictures", done, len(paths))
    if options.json:
        print_json(results)
    failed = sum(result["error"] is not None for result in results) + problems
    if failed:
        complain(f"error: {failed} of those named above could not be used")
    return SOME_FAILED if failed else 0


def _answer(
    predictor: ImagePredictor, path: str, target: Path | None, options: Namespace
) -> dict[str, Any]:
    """Detect on one picture; one that cannot be read is named and has an error for an answer."""
    try:
        [found] = predictor.predict(
            path, options.threshold, tiles=options.tiles, tile_overlap=options.tile_overlap
        )
    except UserError as error:
        complain(f"error: {error}")
        return {"image": path, "detections": [], "picture": None, "error": str(error)}
    if target is not None:
        _write(path, found, target)
    if not options.json:
        _tell(path, found, target)
    picture = None if target is None else str(target)
    return {"image": path, "detections": found.as_dicts(), "picture": picture, "error": None}


def _pictures(given: list[str]) -> tuple[list[str], int]:
    """The pictures among files and folders, and how many of those gave none."""
    found: list[str] = []
    problems = 0
    for text in given:
        try:
            found += _inside(Path(text)) if _is_folder(text) else [text]
        except UserError as error:
            complain(f"error: {error}")
            problems += 1
    return found, problems


def _is_folder(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_dir()
    except OSError:  # reading it as a picture says why
        return False


def _inside(folder: Path) -> Iterator[str]:
    """A folder's pictures; what else is called like one is named and left out.

    Files that are named by themselves may be called anything.

    Raises:
        UserError: it cannot be listed, or has none.
    """
    from d3etr.data.images import IMAGE_SUFFIXES

    try:
        named = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        files = [file for file in named if file.is_symlink() or file.is_file()]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}") from error
    pictures = [str(file) for file in files if not file.name.startswith("._")]
    for count, what in (
        (len(files) - len(pictures), "files that macOS stores next to others ('._' names)"),
        (len(named) - len(files), "folders or devices that are called like pictures"),
    ):
        if count:
            complain(f"{folder}: left out {count} {what}")
    if not pictures:
        raise UserError(
            f"{folder}: no pictures in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    yield from pictures


def _targets(paths: list[str], output: Path | None) -> dict[str, Path]:
    """Where each drawn picture goes; pictures of one name from two folders get a number.

    Raises:
        UserError: a picture would be written over one that is read.
    """
    if output is None:
        return {}
    stems = {path: Path(path).stem for path in paths}
    times = Counter(stems.values())
    numbered = {
        path: stem if times[stem] == 1 else f"{index:04d}-{stem}"
        for index, (path, stem) in enumerate(stems.items())
    }
    if len({*numbered.values()}) < len(numbered):  # a picture's own name looks like a numbered one
        numbered = {path: f"{index:04d}-{stem}" for index, (path, stem) in enumerate(stems.items())}
    targets = {path: output / f"{name}.png" for path, name in numbered.items()}
    read = {os.path.realpath(path) for path in paths}  # which takes links in a circle too
    for target in targets.values():
        if os.path.realpath(target) in read:
            raise UserError(f"--output: {target} is a picture that is read; choose another folder")
    return targets


def _write(path: str, found: Detections, target: Path) -> None:
    from d3etr.drawing import draw

    picture = draw(path, found)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as temporary:
            picture.save(temporary, format="PNG")


def _tell(path: str, found: Detections, target: Path | None) -> None:
    objects = "1 object" if len(found) == 1 else f"{len(found)} objects"
    print(printable(f"{path}: {objects}{f' -> {target}' if target else ''}"))
    for detection in found.as_dicts():
        sides = ", ".join(f"{side:.0f}" for side in detection["box_xyxy"])
        print(f"  {printable(detection['name'])}  {100 * detection['score']:.0f} %  [{sides}]")


COMMAND = Command("predict", "detect objects on pictures", _add_arguments, _run)
