"""Whose result a finished run's is: that of the files which it began with."""

from __future__ import annotations

from pathlib import Path

from d3etr.config.data import SplitConfig
from d3etr.config.tree import Config
from d3etr.data.splits import parse_split
from d3etr.engine.provenance import (
    INPUTS_KEY,
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


class Inputs:
    """Digests of what runs read; each place is read once for as long as this object lives."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], dict[str, str]] = {}

    def ensure_result_is_of(self, config: Config, run_dir: Path) -> None:
        """Refuse a finished run's result where files that it began with have changed since.

        A file that is gone changes nothing: results outlive the teachers.

        Args:
            config: of the run that is wanted now.
            run_dir: the finished run's folder.

        Raises:
            UserError: naming what changed.
        """
        recorded = read_json(RunFolder(run_dir).summary).get(INPUTS_KEY)
        recorded = recorded if isinstance(recorded, dict) else {}
        try:
            now = self._digests(config)
        except UnreachableError as error:
            logger.warning("%s; the result in %s is taken to be of the same files", error, run_dir)
            return
        ensure_same_inputs({key: recorded[key] for key in now if key in recorded}, now, run_dir)

    def _digests(self, config: Config) -> dict[str, str]:
        found = dict[str, str]()
        for key, file in weights_of(config).items():
            if (key, str(file)) not in self._known:
                content = file_content(file)
                self._known[key, str(file)] = {} if content is None else {key: content}
            found |= self._known[key, str(file)]
        for name, split in splits_of(config):
            if (name, repr(split)) not in self._known:
                self._known[name, repr(split)] = _read(name, split)
            found |= self._known[name, repr(split)]
        return found


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
