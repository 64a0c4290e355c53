"""``d3etr predict``: detect objects on pictures."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from d3etr.cli.command import Command, add_device, add_json, add_weights, print_json
from d3etr.errors import UserError

if TYPE_CHECKING:
    from d3etr.inference import Detections

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
"""What counts as a picture in a folder; files named by themselves may be called anything."""


def _add_arguments(parser: ArgumentParser) -> None:
    add_weights(parser)
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="picture files, or folders of them"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write each picture with its boxes there, as PNG",
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score (default 0.5)")
    add_device(parser)
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.inference import load

    paths = list(_pictures(options.images))
    predictor = load(options.weights, options.device)
    results: list[dict[str, object]] = []
    targets = _targets(paths, options.output)
    for path, target in zip(paths, targets, strict=True):
        [found] = predictor.predict(path, options.threshold)
        if target is not None:
            _write(path, found, target)
        results.append(
            {
                "image": str(path),
                "detections": found.as_dicts(),
                "picture": None if target is None else str(target),
            }
        )
        if not options.json:
            _tell(path, found, target)
    if options.json:
        print_json(results)
    return 0


def _pictures(given: list[Path]) -> Iterator[Path]:
    for path in given:
        if not path.is_dir():
            yield path
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not inside:
            raise UserError(f"{path}: no pictures in this folder ({', '.join(sorted(SUFFIXES))})")
        yield from inside


def _targets(paths: list[Path], output: Path | None) -> list[Path | None]:
    """Where each drawn picture goes; pictures of one name from two folders are told apart."""
    if output is None:
        return [None] * len(paths)
    names = [path.stem for path in paths]
    single = (f"{name}.png" for name in names)
    numbered = (f"{index:04d}-{name}.png" for index, name in enumerate(names))
    choices = zip(names, single, numbered, strict=True)
    return [output / (one if names.count(name) == 1 else other) for name, one, other in choices]


def _write(path: Path, found: Detections, target: Path) -> None:
    from d3etr.drawing import draw

    picture = draw(path, found)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(temporary, format="PNG")
        temporary.replace(target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"--output: cannot write {target}: {error.strerror or error}") from error


def _tell(path: Path, found: Detections, target: Path | None) -> None:
    objects = "1 object" if len(found) == 1 else f"{len(found)} objects"
    print(f"{path}: {objects}{f' -> {target}' if target else ''}")
    for detection in found.as_dicts():
        sides = ", ".join(f"{side:.0f}" for side in detection["box_xyxy"])
        print(f"  {detection['name']}  {100 * detection['score']:.0f} %  [{sides}]")


COMMAND = Command("predict", "detect objects on pictures", _add_arguments, _run)
