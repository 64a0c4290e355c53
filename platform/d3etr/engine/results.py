"""Whose result a finished run's is: that of the files which it began with.

A run's summary keeps digests of its inputs, and what the file system said of them at that time:
where that is unchanged, nothing has to be read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d3etr.config.data import SplitConfig
from d3etr.config.location import Location, Url
from d3etr.config.tree import Config
from d3etr.data.splits import fingerprint, parse_split, places_of
from d3etr.engine.provenance import (
    data_digests,
    data_key,
    ensure_same_inputs,
    file_content,
    splits_of,
    weights_of,
)
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.files import read_json
from d3etr.logs import get_logger
from d3etr.storage.problems import MissingFileError, UnreachableError

logger = get_logger(__name__)

INPUTS_KEY, STAMPS_KEY = "inputs", "stamps"
"""Where a summary keeps the digests of a run's inputs, and their stamps."""


class Inputs:
    """What is at the places that runs read; looked at once for as long as this object lives."""

    def __init__(self) -> None:
        self._stamps: dict[Path, str | None] = {}
        self._data: dict[tuple[str, str], dict[str, str]] = {}

    def stamps(self, config: Config) -> dict[str, str]:
        """By key, what the file system says of each input that is on this machine."""
        found = {key: self._stamp(file) for key, file in weights_of(config).items()}
        for name, split in splits_of(config):
            parts = [self._stamp(place) for place in _places(name, split)]
            found[f"data.{name}"] = None if None in parts else "-".join(map(str, parts))
        return {key: stamp for key, stamp in found.items() if stamp is not None}

    def ensure_result_is_of(self, config: Config, run_dir: Path) -> None:
        """Refuse a finished run's result where files that it began with have changed since.

        A file that is gone says nothing: results outlive the teachers.

        Args:
            config: what is asked for now.
            run_dir: the finished run's folder.

        Raises:
            UserError: naming what changed.
        """
        summary = read_json(RunFolder(run_dir).summary)
        recorded, stamps = _texts(summary, INPUTS_KEY), _texts(summary, STAMPS_KEY)
        try:
            now = self._differing(config, stamps)
        except UnreachableError as error:
            logger.warning("%s; the result in %s is taken to be of the same files", error, run_dir)
            return
        ensure_same_inputs({key: recorded[key] for key in now if key in recorded}, now, run_dir)

    def _differing(self, config: Config, before: Mapping[str, str]) -> dict[str, str]:
        """Digests of what is there and not known to be unchanged."""
        now, found = self.stamps(config), dict[str, str]()
        for key, file in weights_of(config).items():
            if key not in now or now[key] != before.get(key):
                content = file_content(file)
                found |= {} if content is None else {key: content}
        for name, split in splits_of(config):
            key = f"data.{name}"
            if key not in now or now[key] != before.get(key):
                found |= self._content(name, split)
        return found

    def _content(self, name: str, split: SplitConfig) -> dict[str, str]:
        which = (name, repr(split))
        if which not in self._data:
            self._data[which] = _read(name, split)
        return self._data[which]

    def _stamp(self, place: Location | None) -> str | None:
        if place is None or isinstance(place, Url):
            return None
        if place not in self._stamps:
            self._stamps[place] = fingerprint(place)
        return self._stamps[place]


def _places(name: str, split: SplitConfig) -> list[Location | None]:
    """What the split is read from; one of them None where that is unknown."""
    try:
        return list(places_of(name, split))
    except UserError:
        return [None]


def _read(name: str, split: SplitConfig) -> dict[str, str]:
    """Digests of a split as it is now; none where it is gone."""
    for place in (split.annotations, split.images):
        if isinstance(place, Path) and not place.exists():
            return {}
    try:
        return data_digests(parse_split(name, split, fetch=False))
    except MissingFileError:
        return {}
    except UnreachableError:
        raise
    except UserError as error:  # it was whole when the run began
        return {data_key(name): str(error)}


def _texts(summary: Mapping[str, Any], key: str) -> dict[str, str]:
    found = summary.get(key)
    if not isinstance(found, dict):
        return {}
    return {name: text for name, text in found.items() if isinstance(text, str)}
