"""A Hugging Face folder of a foundation model: what it says of itself, without its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from d3etr.config.problems import ConfigError
from d3etr.config.yaml_text import parse_yaml
from d3etr.detectors.imports.files import CONFIG, PREPROCESSING, WEIGHTS, read_settings
from d3etr.errors import UserError

FILES = (CONFIG, PREPROCESSING, WEIGHTS)
KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit")
"""``model_type`` of those that are taken: what they return begins with the class token and the
registers, and patches follow row by row."""
_CARD = "README.md"
_LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "LICENCE.md", "LICENCE.txt")

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class FoundationFolder:
    """What the files beside the tensors say.

    Attributes:
        path: the folder.
        kind: one of ``KINDS``.
        mean: of pixels in [0, 1] that the model takes away, per channel.
        std: that it divides by, per channel.
        licence: what the folder says of it, for people; None where it says nothing.
    """

    path: Path
    kind: str
    mean: Channels
    std: Channels
    licence: str | None


def read_foundation_folder(path: Path) -> FoundationFolder:
    """Read what a folder says of its model.

    Args:
        path: of ``teacher.features``.

    Raises:
        UserError: it is no folder, a file is missing or broken, or the model is another one.
    """
    if not path.is_dir():
        raise UserError(
            f"teacher.features: there is no folder {path.absolute()}. Expected one with "
            f"{', '.join(FILES)} of a DINOv2 or DINOv3 ViT; nothing is downloaded by a name"
        )
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise UserError(
            f"teacher.features {path}: {' and '.join(missing)} missing in this folder. Expected "
            f"{', '.join(FILES)}, as save_pretrained of model and image processor writes them"
        )
    kind = read_settings(path / CONFIG).get("model_type")
    if kind not in KINDS:
        raise UserError(
            f"teacher.features {path / CONFIG}: the model is a {kind!r}; expected a ViT of DINOv2 "
            f"or DINOv3, model_type {', '.join(KINDS)}. A detector teaches by teacher.weights"
        )
    settings, place = read_settings(path / PREPROCESSING), path / PREPROCESSING
    _require_rescaling(settings, place)
    mean, std = (_channels(settings, key, place) for key in ("image_mean", "image_std"))
    if min(std) <= 0:
        raise UserError(f"teacher.features {place}: image_std is {list(std)}; expected above 0")
    return FoundationFolder(path, kind, mean, std, _licence(path))


def _require_rescaling(settings: Mapping[str, Any], place: Path) -> None:
    factor = settings.get("rescale_factor", 1 / 255)
    known = isinstance(factor, int | float) and isclose(factor, 1 / 255, rel_tol=1e-3)
    if known and settings.get("do_rescale", True) and settings.get("do_normalize", True):
        return
    raise UserError(
        f"teacher.features {place}: expected pixels that are divided by 255 and normalised "
        "(do_rescale true with rescale_factor 1/255, do_normalize true)"
    )


def _channels(settings: Mapping[str, Any], key: str, place: Path) -> Channels:
    values = settings.get(key)
    if isinstance(values, list) and len(values) == 3:
        if all(isinstance(value, int | float) and abs(value) < 1e3 for value in values):
            red, green, blue = map(float, values)
            return red, green, blue
    raise UserError(f"teacher.features {place}: {key} is {values!r}; expected three numbers")


def _licence(folder: Path) -> str | None:
    """What the model card's front matter names, and a licence's file."""
    found = []
    named = _front_matter(folder / _CARD)
    # Licences without a name of their own on the hub are called "other" there.
    value = named.get("license_name") or named.get("license")
    if value:
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        found.append(f"{text} ({_CARD})")
    found += [f"the text in {name}" for name in _LICENCES if (folder / name).is_file()]
    return ", ".join(found) or None


def _front_matter(card: Path) -> Mapping[str, Any]:
    """Keys between the two lines of dashes that a model card begins with; none where it has none.

    A card that cannot be read names no licence, which is what people are told then.
    """
    if not card.is_file():
        return {}
    head, *rest = card.read_text(errors="replace").lstrip("\ufeff").split("\n---", 1)
    if not rest or not head.startswith("---"):
        return {}
    try:
        tree = parse_yaml(head.removeprefix("---"), str(card))
    except ConfigError:
        return {}
    return tree if isinstance(tree, dict) else {}
