"""A detector as a folder of Hugging Face's: what ``from_pretrained`` of transformers reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.exports.inversion import invert
from d3etr.detectors.exports.settings import Described, describe
from d3etr.detectors.foundation import quiet, require_transformers
from d3etr.detectors.imports.categories import choose_rows
from d3etr.detectors.imports.layouts import Agree, rename
from d3etr.detectors.weights import WeightsInfo
from d3etr.errors import UserError
from d3etr.files import atomic_write

NAME = "hugging-face"
"""As ``d3etr export --format`` has it."""


def export_folder(folder: Path, detector: DetectionTransformer, info: WeightsInfo) -> list[Path]:
    """Write a detector as transformers has it, whole or not at all.

    Args:
        folder: to make; its parents are made.
        detector: whose state is written, in float32.
        info: describes it.

    Returns:
        The files: ``config.json``, ``model.safetensors``, ``preprocessor_config.json``.

    Raises:
        UserError: the folder is there already or cannot be written, transformers is missing or too
            old, or it has no such detector.
    """
    require_transformers(f"--format {NAME}")
    ensure_new(folder)
    described = describe(detector, info)
    with quiet():
        model, processor = _theirs(described)
        settings = model.config.to_dict()
        ours = detector.state_dict()
        theirs = model.state_dict()

        def take(tensors: Mapping[str, Tensor], agree: Agree) -> dict[str, Tensor]:
            found = rename(
                tensors,
                info.detector.name,
                box_refinement=bool(settings.get("with_box_refine")),
                shared_box_head=bool(settings.get("share_bbox_head")),
                agree=agree,
            )
            count, config = len(described.model["id2label"]), info.detector
            softmax, classes_first = config.softmax_classes, config.proposals_tell_classes
            choose_rows(found, described.slots, count, softmax, classes_first)
            return found

        # What the import does not look at, such as counters of batches, is as transformers has it.
        _write(folder, model, {**theirs, **invert(theirs, ours, take)}, processor)
    return sorted(folder.iterdir())


def ensure_new(folder: Path) -> None:
    """Refuse a folder that would be written over.

    Raises:
        UserError: there is something of that name.
    """
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} is there already: name a folder that is not, or remove it")


def _theirs(described: Described) -> tuple[Any, Any]:
    """Their model with random weights, and their image processor."""
    import transformers  # takes seconds

    config = transformers.AutoConfig.for_model(**described.model)
    model = transformers.AutoModelForObjectDetection.from_config(config)
    return model, getattr(transformers, described.processor)(**described.preprocessing)


def _write(folder: Path, model: Any, tensors: dict[str, Tensor], processor: Any) -> None:
    """Write all tensors, copies too: the model has one where layers' heads of ours differ."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder) as temporary:
            model.save_pretrained(temporary, state_dict=tensors)
            processor.save_pretrained(temporary)
            for file in temporary.iterdir():
                file.chmod(0o644)  # safetensors writes for the owner only; storage is shared
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"cannot write {folder} ({error}): free some space, or choose another place"
        ) from error
