"""The benchmark on disk: a COCO-format folder that is whole and as it was written, or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3etr.config.data import DigitScenesConfig, SplitConfig
from d3etr.data.digit_scenes.drawing import (
    CLASSES,
    SPLITS,
    Digit,
    Scene,
    SplitName,
    draw_scene,
    load_divided_digits,
)
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.progress import OnProgress

VERSION = "1"
"""Goes up whenever a setting's pictures change; results of different versions do not compare."""

DEFAULT_DIGESTS = {
    "train": "5d0714b519b0f7def7492c3fdb1d39859b090949862e91efc12f86dc0fd6cd1f",
    "validation": "6f81cda4c06274cec215f24c9831958969457d004cd4b7838803d7e81a516dbc",
    "test": "a10bf247c1ac24461720fc1274d232e4cdb30058d6638aa7e2e60651a3361bb4",
}
"""sha256 over the files of each split under the default settings."""

_DIGEST_FILE = "digest.json"
_LOGGER = get_logger(__name__)
_PROGRESS_EVERY = 100


def write_digit_scenes(
    config: DigitScenesConfig,
    on_progress: OnProgress | None = None,
    *,
    verify: Sequence[str] = SPLITS,
) -> dict[str, SplitConfig]:
    """Write the benchmark, or find it written: where each split is.

    A folder that differs from what was written is named in a warning and written again.

    Args:
        config: the settings.
        on_progress: called while images are written.
        verify: splits whose every byte is compared with the digest file before reuse.

    Raises:
        UserError: the settings cannot be met, or the folder cannot be written.
    """
    folder = scenes_folder(config)
    damage = find_damage(folder, verify)
    if damage is not None:
        if folder.exists():
            text = "digit scenes in %s are damaged (%s): writing them again"
            _LOGGER.warning(text, folder, damage)
        try:
            _write(config, folder, on_progress)
        except OSError as error:
            raise UserError(
                f"data.digit_scenes.root: cannot write {folder} ({error.strerror or error}): "
                f"choose a folder that is writable and has {_megabytes(config)} MB of space"
            ) from error
    return split_paths(folder)


def scenes_folder(config: DigitScenesConfig) -> Path:
    """The folder of these settings: equal settings share it, others get their own."""
    digest = hashlib.sha256(json.dumps(_settings(config), sort_keys=True).encode()).hexdigest()
    return config.root / f"v{VERSION}-{config.image_size}px-seed{config.seed}-{digest[:8]}"


def split_paths(folder: Path) -> dict[str, SplitConfig]:
    """Images and annotations of each split in ``folder``."""
    return {
        name: SplitConfig(images=images, annotations=annotations)
        for name in SPLITS
        for images, annotations in [_places(folder, name)]
    }


def _places(folder: Path, name: str) -> tuple[Path, Path]:
    """Image folder and annotation file of a split."""
    return folder / "images" / name, folder / "annotations" / f"{name}.json"


def find_damage(folder: Path, splits: Sequence[str]) -> str | None:
    """Compare every byte of ``splits`` with the digest file: what differs, or None."""
    try:
        written = json.loads((folder / _DIGEST_FILE).read_bytes())["splits"]
        for name in splits:
            if _split_digest(folder, name) != written[name]["digest"]:
                return f"split {name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _settings(config: DigitScenesConfig) -> dict[str, Any]:
    return {"version": VERSION, **config.model_dump(mode="json", exclude={"root"})}


def _megabytes(config: DigitScenesConfig) -> int:
    images = config.train_images + config.validation_images + config.test_images
    return 1 + images * (3 * config.image_size**2 + 500) // 10**6


def _write(config: DigitScenesConfig, folder: Path, on_progress: OnProgress | None) -> None:
    """Write into a temporary folder next to ``folder``, then put it in place."""
    config.root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=config.root))
    try:
        for name, digits in load_divided_digits().items():
            _write_split(config, temporary, name, digits, on_progress)
        _write_digests(config, temporary)
        temporary.chmod(0o755)
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_digests(config: DigitScenesConfig, folder: Path) -> None:
    splits = {name: {"digest": _split_digest(folder, name)} for name in SPLITS}
    content = {"settings": _settings(config), "splits": splits}
    (folder / _DIGEST_FILE).write_text(json.dumps(content, indent=1) + "\n")
    found = {name: split["digest"] for name, split in splits.items()}
    if _settings(config) == _settings(DigitScenesConfig()) and found != DEFAULT_DIGESTS:
        _LOGGER.warning(
            "digit scenes drawn here differ from version %s as published (another version of "
            "Pillow or NumPy?): results do not compare with published ones",
            VERSION,
        )


def _put_in_place(temporary: Path, folder: Path) -> None:
    if find_damage(folder, SPLITS) is None:
        # Another process was faster.
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if find_damage(folder, SPLITS) is not None:
            raise


def _write_split(
    config: DigitScenesConfig,
    folder: Path,
    name: SplitName,
    digits: list[Digit],
    on_progress: OnProgress | None,
) -> None:
    image_folder, annotation_file = _places(folder, name)
    image_folder.mkdir(parents=True)
    annotation_file.parent.mkdir(exist_ok=True)
    count = getattr(config, f"{name}_images")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        scene = draw_scene(config, name, index, digits)
        file_name = f"{index + 1:06d}.png"
        (image_folder / file_name).write_bytes(png_bytes(scene.pixels))
        size = {"width": config.image_size, "height": config.image_size}
        images.append({"id": index + 1, "file_name": file_name, **size})
        annotations += _annotations(scene, index + 1, len(annotations) + 1)
        if on_progress is not None and (index + 1) % _PROGRESS_EVERY in (0, count):
            on_progress(f"digit scenes, {name}", index + 1, count)
    content = {
        "info": {"description": "digit scenes", "version": VERSION, "split": name},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label, "name": str(label)} for label in range(CLASSES)],
    }
    annotation_file.write_text(json.dumps(content))


def _annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "image_id": image_id,
            "category_id": digit.label,
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
            "iscrowd": 0,
            # Which handwritten digit this is, so that anyone can check what splits share.
            "digit": digit.source,
        }
        for number, (digit, (left, top, right, bottom)) in enumerate(
            zip(scene.digits, scene.boxes_xyxy, strict=True), start=first_id
        )
    ]


def png_bytes(pixels: NDArray[np.uint8]) -> bytes:
    """An uncompressed PNG file of ``pixels`` [height, width, 3].

    Compressors differ between versions, and with them file sizes and the data's digest, to which
    results belong. Scenes are noisy and compress badly anyway.
    """
    height, width, _ = pixels.shape
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))  # column 0: filter type "none"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _split_digest(folder: Path, name: str) -> str:
    """sha256 over names and bytes of one split's files."""
    images, annotations = _places(folder, name)
    digest = hashlib.sha256(annotations.read_bytes())
    for file_name in sorted(os.listdir(images)):
        digest.update(file_name.encode())
        digest.update((images / file_name).read_bytes())
    return digest.hexdigest()
