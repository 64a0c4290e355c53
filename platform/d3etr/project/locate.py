"""Where the splits of a data set are, from one path that a person names."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from d3etr.config.data import SplitConfig
from d3etr.data.annotations import DataFormat
from d3etr.data.formats import AUTO, find_format
from d3etr.data.formats.coco import read_images
from d3etr.data.splits import Keys
from d3etr.errors import UserError
from d3etr.project.names import NAMES, split_of, splits_among, unused

_PARTS = {"yolo": "keys", "voc": "lists in ImageSets/Main", "imagefolder": "folders"}
"""Format -> what its parts are."""
_TAKES_IMAGES = Keys("--images", "DATA")
_KNOWS_IMAGES = Keys("DATA", "DATA")
_LOOKED_AT = 400
"""JSON files of a folder that are looked at."""
_BEGIN = 100
"""Bytes that a file's first bracket is among."""


@dataclass(frozen=True)
class Located:
    """Where a data set is.

    Attributes:
        splits: train, and maybe validation and test; without validation, the images of train are
            still to be divided.
        format: as people call it.
        keys: what error texts call what the person named.
        part: what the data set calls the part that is to be divided; None where it has no parts.
        warnings: what may be wrong, a sentence each.
    """

    splits: dict[str, SplitConfig]
    format: str
    keys: Keys
    part: str | None = None
    warnings: tuple[str, ...] = ()


def locate(data: Path, images: Path | None = None, *, follow_links: bool = False) -> Located:
    """Find the splits of a data set.

    Args:
        data: a COCO file or a folder with such files, YOLO's data.yaml or its folder, a Pascal VOC
            folder, or an image folder.
        images: the folder of the images of COCO files or Pascal VOC; None: looked for around them.
        follow_links: whether links may lead out of the folder of images.

    Raises:
        UserError: nothing is there, it is in no format that is known, or its parts have names that
            do not tell which split they are.
    """
    found = _located(data.absolute(), images and images.absolute())
    links = {"follow_links": follow_links}
    splits = {name: split.model_copy(update=links) for name, split in found.splits.items()}
    return replace(found, splits=splits)


def _located(data: Path, images: Path | None) -> Located:
    if not data.exists():
        raise UserError(
            f"{data} is not there; expected a COCO file or a folder with such files, a YOLO "
            "data.yaml or its folder, a Pascal VOC folder, or an image folder with metadata.jsonl"
        )
    if data.suffix.lower() == ".json":
        return Located({"train": _coco_split(data, images)}, "COCO", _TAKES_IMAGES)
    files = _coco_files(data) if data.is_dir() else []
    if files:
        return _of_coco_files(data, files, images)
    if data.is_dir() and (data / "labels").is_dir():
        _require_data_yaml(data)
    name, found = _known_format(data)
    if images is not None and name != "voc":
        raise UserError(
            f"--images {images}: only COCO files and Pascal VOC need it, and {data} is another "
            f"format ({found.title}): remove it"
        )
    keys = _TAKES_IMAGES if name == "voc" else _KNOWS_IMAGES
    subsets: Sequence[str] = getattr(found, "subsets", lambda place: ())(data)
    if not subsets:
        return Located({"train": _split(data, images)}, found.title, keys)
    parts = {subset: split_of(subset) for subset in subsets}
    chosen = splits_among(data, parts, _PARTS.get(name, "parts"))
    splits = {split: _split(data, images, subset) for split, subset in chosen.items()}
    return _of_parts(Located(splits, found.title, keys), parts, chosen)


def _known_format(data: Path) -> tuple[str, DataFormat]:
    """The format of what is no COCO file, and no folder with such files."""
    with suppress(UserError):  # which would advise a key of recipes
        name, found = find_format(AUTO, data)
        if name != "coco":
            return name, found
    raise UserError(
        f"{data} is in no format that is known: expected a .json file with images, annotations and "
        "categories (COCO), data.yaml (YOLO), XML files or Annotations with such (Pascal "
        "VOC), or metadata.jsonl (image folder); name the file or folder that has them"
    )


def _split(data: Path, images: Path | None, subset: str | None = None) -> SplitConfig:
    return SplitConfig(annotations=data, images=images, subset=subset)


def _of_parts(
    found: Located, parts: Mapping[str, str | None], chosen: Mapping[str, str]
) -> Located:
    """With what is to be said of a data set's parts; ``chosen`` are those that are splits."""
    divided = "validation" not in chosen and parts[chosen["train"]] is not None
    part = chosen["train"] if divided else None
    return replace(found, part=part, warnings=(*unused(parts, chosen),))


def _require_data_yaml(data: Path) -> None:
    if not (data / "data.yaml").is_file():
        raise UserError(
            f"{data} has YOLO's folder 'labels' and no data.yaml, which names the classes: write "
            f"{data / 'data.yaml'} with the lines 'train: images' and 'names: [FIRST, SECOND]'"
        )


def _coco_files(folder: Path) -> list[Path]:
    """COCO detection files in a folder, its ``annotations``, and the folders of its splits."""
    candidates = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*/*.json"))]
    return [path for path in candidates[:_LOOKED_AT] if _is_coco(path)]


def _is_coco(path: Path) -> bool:
    """Whether a file begins as a COCO file does, and has boxes of classes.

    Results are lists, not objects, and captions have no classes.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return False
    begin = content[:_BEGIN].removeprefix(BOM_UTF8).lstrip()
    keys = (b'"images"', b'"annotations"', b'"categories"')
    return begin.startswith(b"{") and all(key in content for key in keys)


def _of_coco_files(data: Path, files: list[Path], images: Path | None) -> Located:
    """COCO files by what their names, or else those of their folders, say."""
    parts = {path.relative_to(data).as_posix(): _called(path, data) for path in files}
    chosen = splits_among(data, parts, "COCO files")
    splits = {split: _coco_split(data / name, images) for split, name in chosen.items()}
    return _of_parts(Located(splits, "COCO", _TAKES_IMAGES), parts, chosen)


def _called(path: Path, data: Path) -> str | None:
    """The split that a file's name says, or its folder's where that is below ``data``."""
    return split_of(path.stem) or (None if path.parent == data else split_of(path.parent.name))


def _coco_split(path: Path, images: Path | None) -> SplitConfig:
    folder = _image_folder(path) if images is None else images
    return SplitConfig(images=folder, annotations=path)


def _image_folder(path: Path) -> Path:
    """The folder that the names in a COCO file are relative to.

    Raises:
        UserError: no folder around the file has its images.
    """
    name = read_images(path)[0][0].file_name
    tried = list(dict.fromkeys(_likely_folders(path)))
    for folder in tried:
        if (folder / name).is_file():
            return folder
    raise UserError(
        f"{path}: its first image {name!r:.200} is not in {', '.join(map(str, tried[:4]))}, ...; "
        "say where the images are with --images FOLDER"
    )


def _likely_folders(path: Path) -> Iterator[Path]:
    """Folders around a COCO file where its images may be, likely ones first."""
    here, above = path.parent, path.parent.parent
    words = [path.stem, path.stem.removeprefix("instances_")]
    words += NAMES.get(split_of(path.stem) or split_of(here.name) or "", ())
    for root in (here, above):
        yield from (root / word for word in words)
        yield from (root / "images" / word for word in words)
        yield root / "images"
        yield root
