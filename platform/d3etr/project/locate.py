"""Where the splits of a data set are, from one path that a person names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from d3etr.config.data import SplitConfig
from d3etr.data.formats import AUTO, find_format
from d3etr.data.formats.coco import read_images
from d3etr.errors import UserError

NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}
"""Split -> what data sets call it."""
WHOLE = "all"
"""The split of a data set that has no splits."""
_LOOKED_AT = 400
"""JSON files of a folder that are looked at."""


@dataclass(frozen=True)
class Located:
    """Where a data set is.

    Attributes:
        splits: train, validation and maybe test; or ``WHOLE`` alone, which is still to be split.
        format: as people call it.
    """

    splits: dict[str, SplitConfig]
    format: str


def locate(data: Path, images: Path | None = None) -> Located:
    """Find the splits of a data set.

    Args:
        data: a COCO file or a folder with such files, YOLO's data.yaml or its folder, a Pascal VOC
            folder, or an image folder.
        images: the folder of a COCO file's images; None: looked for around the file.

    Raises:
        UserError: nothing is there, or it is in no format that is known.
    """
    data = data.absolute()
    if not data.exists():
        raise UserError(
            f"{data} is not there; expected a COCO file or a folder with such files, a YOLO "
            "data.yaml or its folder, a Pascal VOC folder, or an image folder with metadata.jsonl"
        )
    if data.suffix.lower() == ".json":
        return Located({WHOLE: _coco_split(data, images)}, "COCO")
    files = _coco_files(data) if data.is_dir() else []
    if files:
        return _of_coco_files(data, files, images)
    if images is not None:
        raise UserError(
            f"--images {images}: only COCO files need it, and {data} is none: remove it"
        )
    if data.is_dir() and (data / "labels").is_dir():
        _require_data_yaml(data)
    name, found = find_format(AUTO, data)
    if name == "coco":
        raise UserError(
            f"{data} is in no format that is known: expected a .json file (COCO), data.yaml "
            "(YOLO), or a folder of a data set"
        )
    subsets: Sequence[str] = getattr(found, "subsets", lambda place: ())(data)
    return Located(_of_subsets(data, subsets), found.title)


def _require_data_yaml(data: Path) -> None:
    if not (data / "data.yaml").is_file():
        raise UserError(
            f"{data} has YOLO's folder 'labels' and no data.yaml, which names the classes: write "
            f"{data / 'data.yaml'} with the lines 'train: images' and 'names: [FIRST, SECOND]'"
        )


def _of_subsets(data: Path, subsets: Sequence[str]) -> dict[str, SplitConfig]:
    """Splits by the names that a data set has for them."""
    found = dict[str, str]()
    for split, names in NAMES.items():
        named = next((name for name in names if name in subsets), None)
        if named is not None:
            found[split] = named
    if {"train", "validation"} <= {*found}:
        return {
            split: SplitConfig(annotations=data, subset=subset) for split, subset in found.items()
        }
    subset = found.get("train") or next(iter(subsets), None)
    return {WHOLE: SplitConfig(annotations=data, subset=subset)}


def _coco_files(folder: Path) -> list[Path]:
    """COCO detection files in a folder, its ``annotations``, and the folders of its splits."""
    candidates = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*/*.json"))]
    return [path for path in candidates[:_LOOKED_AT] if _is_coco(path)]


def _is_coco(path: Path) -> bool:
    """Whether a file begins as a COCO file does; results files are lists, not objects."""
    try:
        with path.open("rb") as file:
            start = file.read(1)
            rest = start + file.read()
    except OSError:
        return False
    return start == b"{" and all(key in rest for key in (b'"images"', b'"annotations"'))


def _of_coco_files(data: Path, files: list[Path], images: Path | None) -> Located:
    """COCO files by what their names, or those of their folders, say."""
    found = dict[str, Path]()
    for split, names in NAMES.items():
        of_split = [path for path in files if _is_called(path, names)]
        if len(of_split) > 1:
            raise UserError(
                f"{data}: found several COCO files of the {split} split "
                f"({', '.join(str(path.relative_to(data)) for path in of_split[:5])}); expected "
                "one: name the file itself, or move the others away"
            )
        if of_split:
            found[split] = of_split[0]
    if {"train", "validation"} <= {*found}:
        splits = {split: _coco_split(path, images) for split, path in found.items()}
        return Located(splits, "COCO")
    if len(files) > 1:
        raise UserError(
            f"{data}: found the COCO files "
            f"{', '.join(str(path.relative_to(data)) for path in files[:5])}; expected one, or "
            "names that say which is 'train' and which 'val'"
        )
    return Located({WHOLE: _coco_split(files[0], images)}, "COCO")


def _is_called(path: Path, names: Sequence[str]) -> bool:
    """Whether a part of a file's name, or of its folder's, is among ``names``."""
    text = f"{path.parent.name} {path.stem}".lower()
    for mark in "-_.0123456789":
        text = text.replace(mark, " ")
    return not {*text.split()}.isdisjoint(names)


def _coco_split(path: Path, images: Path | None) -> SplitConfig:
    folder = _image_folder(path) if images is None else images.absolute()
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
    called = [names for names in NAMES.values() if _is_called(path, names)]
    words += [name for names in called for name in names]
    for root in (here, above):
        yield from (root / word for word in words)
        yield from (root / "images" / word for word in words)
        yield root / "images"
        yield root
