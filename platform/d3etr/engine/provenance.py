"""What a run begins with, by content: results belong to these files and to no others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from d3etr.config.data import SplitConfig
from d3etr.config.location import Url
from d3etr.config.tree import Config
from d3etr.data.file_labels import LABELS_KEY
from d3etr.data.splits import UNLABELLED, DetectionSplit, parse_split
from d3etr.detectors.foundation_folder import FILES
from d3etr.detectors.weights import file_digest
from d3etr.engine.distributed import TrainContext
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.files import read_json
from d3etr.logs import get_logger
from d3etr.storage.fetch import fetch_file
from d3etr.storage.problems import MissingFileError, UnreachableError
from d3etr.storage.remote import ensure_reachable

logger = get_logger(__name__)

INPUTS_KEY = "inputs"
"""Where a summary keeps the digests of a run's inputs."""
HASHED_BYTES = 256 * 2**20
"""Images of a split that together have at most so many bytes are compared byte by byte."""


def weight_digests(config: Config) -> dict[str, str]:
    """SHA-256 of what ``files_of`` names and that is there, by key.

    Raises:
        UserError: a storage does not answer, or refuses.
    """
    found = {key: file_content(file) for key, file in files_of(config).items()}
    return {key: digest for key, digest in found.items() if digest is not None}


def data_digests(split: DetectionSplit) -> dict[str, str]:
    """What a split holds, by what error texts call it: annotations with names, and images."""
    if split.parts:
        return {key: value for part in split.parts for key, value in data_digests(part).items()}
    images = _images_digest(split)
    found = {data_key(split.name): split.digest}
    if split.unlabelled is not None:
        found |= data_digests(split.unlabelled)
    return found if images is None else found | {data_key(split.name, "images"): images}


def data_key(split: str, what: str = "data") -> str:
    """What digests and error texts call a split's annotations, or its images."""
    return f"the {'training' if split == 'train' else split} {what}"


def _images_digest(split: DetectionSplit) -> str | None:
    """Of the images' content; None where they are elsewhere.

    More than ``HASHED_BYTES`` on this machine count by their names and sizes only.
    """
    records, images = (*split.records, *split.left_out), split.images
    names = sorted({record.file_name for record in records})
    if not images.is_readable:
        return None
    if sum(images.size(name) or 0 for name in names) > HASHED_BYTES:
        return split.digest
    contents = [file_content(images.path(name)) or "" for name in names]
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()


def remote_files(config: Config) -> dict[str, Url]:
    """The URLs of single files that a run reads, by key."""
    places = {f"data.{name}.annotations": split.annotations for name, split in splits_of(config)}
    places |= files_of(config)
    return {key: place for key, place in places.items() if isinstance(place, Url)}


def remote_folders(config: Config) -> dict[str, Url]:
    """The URLs of image folders that a run reads, by key."""
    places = {f"data.{name}.images": split.images for name, split in splits_of(config)}
    return {key: place for key, place in places.items() if isinstance(place, Url)}


def file_content(file: Url | Path) -> str | None:
    """SHA-256 of a file, wherever it is; None if it is gone.

    Raises:
        UserError: a storage does not answer, or refuses.
    """
    try:
        path = file if isinstance(file, Path) else fetch_file(file)
    except MissingFileError:
        return None
    return file_digest(path) if path.is_file() else None


def ensure_inputs_answer(configs: Iterable[Config]) -> None:
    """Make sure, within seconds, that storage has what runs read; nothing is fetched.

    Raises:
        UserError: naming every URL that is not there or does not answer.
    """
    files, folders = set[tuple[str, Url]](), set[tuple[str, Url]]()
    for config in configs:
        files.update(remote_files(config).items())
        folders.update(remote_folders(config).items())
    ensure_reachable(files, folders)


def splits_of(config: Config) -> list[tuple[str, SplitConfig]]:
    """The splits that a run reads from places that the configuration names."""
    data = config.data
    splits = {"train": data.train, "validation": data.validation}
    if config.evaluation.test:
        splits["test"] = data.test
    if data.unlabelled is not None:
        splits[UNLABELLED] = data.unlabelled.place
    return [(name, split) for name, split in splits.items() if split is not None]


def weights_of(config: Config) -> dict[str, Url | Path]:
    """The weights files that a run begins with, by key."""
    start = config.student.initialise_from
    files = {
        "student.backbone_weights": config.student.backbone_weights,
        "student.initialise_from.weights": None if start is None else start.weights,
        "teacher.weights": None if config.teacher is None else config.teacher.weights,
    }
    return {key: file for key, file in files.items() if isinstance(file, Url | Path)}


def files_of(config: Config) -> dict[str, Url | Path]:
    """The single files that a run begins with, by key: weights, boxes of teachers."""
    found, teacher = weights_of(config), config.teacher
    if teacher is not None:
        boxes = teacher.detections or ()
        found |= {f"teacher.detections[{place}]": file for place, file in enumerate(boxes)}
    if teacher is not None and teacher.features is not None:
        found |= {f"teacher.features/{name}": teacher.features / name for name in FILES}
    unlabelled = config.data.unlabelled
    if unlabelled is not None and unlabelled.labels is not None:
        found[LABELS_KEY] = unlabelled.labels
    return found


def ensure_same_inputs(before: Mapping[str, str], now: Mapping[str, str], run_dir: Path) -> None:
    """Refuse to continue a run, or to take its result, with other files.

    Args:
        before: digests that the run began with, by name.
        now: those of today; names that were not recorded then do not count.
        run_dir: the run's folder.

    Raises:
        UserError: naming what changed.
    """
    changed = sorted(name for name in before if before[name] != now.get(name))
    if changed:
        verb = "is" if len(changed) == 1 and not changed[0].endswith("images") else "are"
        raise UserError(
            f"{' and '.join(changed)} {verb} not what the run in {run_dir} began with: its "
            "results would belong to neither. Put the old files back, or give the run another "
            "name (run.name; a sweep: name) to start anew"
        )


def ensure_same_everywhere(digests: Mapping[str, str], context: TrainContext) -> None:
    """Make sure that all workers read the same files: paths and caches are each machine's own.

    Args:
        digests: SHA-256 by name, hex, of what this worker reads; all workers have these names.
        context: the workers.

    Raises:
        UserError: at rank 0, naming what differs.
    """
    names = sorted(digests)
    # 15 hex digits fit into an int64.
    ours = torch.tensor([[int(digests[name][:15], 16) for name in names]], device=context.device)
    every = context.gather(ours)
    if every is None:
        return
    differ = [
        name
        for name, column in zip(names, torch.cat(every).T, strict=True)
        if column.unique().numel() > 1
    ]
    if differ:
        raise UserError(
            f"workers on different machines do not read the same files: {' and '.join(differ)} "
            "differ. A path must lead to the same content on every machine; what a URL names "
            "may have changed while machines fetched it: start the run again"
        )


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
        for key, file in files_of(config).items():
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
