"""Reading a data set of any format, for tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from d3etr.config.data import SplitConfig
from d3etr.data.splits import DetectionSplit, read_split
from d3etr.errors import UserError


def read(place: Path, name: str = "train", **keys: str) -> DetectionSplit:
    return read_split(name, SplitConfig(annotations=place, **keys))


def problem(place: Path, name: str = "train", **keys: str) -> str:
    with pytest.raises(UserError) as caught:
        read(place, name, **keys)
    assert str(caught.value).startswith(f"data.{name}.annotations")
    return str(caught.value)
