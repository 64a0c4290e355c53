"""The splits of a configuration, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from d3etr.config.data import DataConfig, SplitConfig
from d3etr.data.coco import DetectionSplit, read_split
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.data.progress import Progress
from d3etr.errors import UserError

SPLIT_NAMES: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")


def configured_splits(
    data: DataConfig, progress: Progress | None = None, *, verify: Sequence[str] = SPLIT_NAMES
) -> dict[str, SplitConfig]:
    """The splits that ``data`` names; digit scenes are written where they do not exist yet.

    Args:
        data: where the splits are.
        progress: told about the writing.
        verify: splits of digit scenes whose files are compared with their digest.

    Raises:
        UserError: digit scenes cannot be written.
    """
    if data.digit_scenes is not None:
        return write_digit_scenes(data.digit_scenes, progress, verify=verify)
    configured = {name: getattr(data, name) for name in SPLIT_NAMES}
    return {name: split for name, split in configured.items() if split is not None}


def open_split(
    data: DataConfig,
    name: Literal["train", "validation", "test"],
    progress: Progress | None = None,
    *,
    fetch: bool = True,
) -> DetectionSplit:
    """Read one split of ``data``.

    Args:
        data: where the splits are.
        name: the one to read.
        progress: told of what is written or fetched for it.
        fetch: False leaves a URL's images where they are and only makes sure that they exist.

    Raises:
        UserError: the split is not configured or cannot be used.
    """
    splits = configured_splits(data, progress, verify=[name])
    if name not in splits:
        raise UserError(
            f"data.{name} is not set, but the {name} split is needed: set data.{name}.images and "
            f"data.{name}.annotations (configured: {', '.join(splits)})"
        )
    return read_split(name, splits[name], progress, fetch=fetch)
